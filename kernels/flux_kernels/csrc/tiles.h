// A block of 32 rows and 64 columns by AMX, whose eight tiles have 16 rows of 64 bytes: 0 to 3 are sums of 32 columns,
// 4 and 5 rows of x, 6 and 7 columns of the strip, which lies as the instructions want it.
//
// Compiled for every processor, as the compiler writes none of these instructions by itself; run where there are tiles.
#pragma once

#include "simd.h"

template <class Kind>
struct Tiles {
    using Number = typename Kind::Number;
    static constexpr int ROWS = 32;
    // Bytes of a row that a strip holds, and of strips that stay in the second-level cache, for which x is read once.
    static constexpr int64_t DEPTH = 6144, KEPT = 2 * COLUMNS * DEPTH;
    static __m512i turned(__m512i w) { return w; }

    int configured = 0;  // rows
    ~Tiles() {
        if (configured) _tile_release();
    }

    // Rows that are not there are neither read nor written.
    void configure(int rows) {
        if (rows == configured) return;
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } wanted;
        const uint8_t upper = uint8_t(rows < 16 ? rows : 16), lower = uint8_t(rows - upper);
        const uint8_t heights[8] = {upper, upper, lower, lower, upper, lower, 16, 16};
        for (int i = 0; i < 8; ++i) {
            wanted.rows[i] = heights[i];
            wanted.bytes[i] = heights[i] ? 64 : 0;
        }
        asm volatile("" ::"m"(wanted));
        _tile_loadconfig(&wanted);
        configured = rows;
    }

    // Sums of `rows` rows of x with `columns` of a strip, on top of those that are there unless they are `fresh`.
    // Meanwhile 16 rows from `next` on come nearer, if it is given: what reads them waits for memory otherwise.
    void block(const char* x, int64_t stride, int rows, const char* strip, int64_t bytes, int columns, Number* sums,
               bool fresh, const char* next = nullptr) {
        configure(rows);
        const int64_t steps = bytes / 64, rest = bytes % 64;
        alignas(64) char tail[ROWS * 64];  // the last numbers, with zeros behind them: a tile has all its columns
        if (rest)
            for (int i = 0; i < rows; ++i)
                _mm512_store_si512(tail + i * 64,
                                   _mm512_maskz_loadu_epi32(first(rest / 4), x + i * stride + steps * 64));
        asm volatile("" ::: "memory");  // the compiler does not know that tiles are read from memory
        for (int half = 0; half < columns; half += 32) {
            const auto some = rows > 16 ? part<true> : part<false>;
            some(x, stride, strip + half * 4, steps, rest ? tail : nullptr, sums + half, fresh,
                 next ? next + half / 4 * stride : nullptr);
        }
    }

    template <bool Both>
    static void part(const char* x, int64_t stride, const char* strip, int64_t steps, const char* tail, Number* sums,
                     bool fresh, const char* next) {
        if (fresh) {
            _tile_zero(0);
            _tile_zero(1);
            if (Both) _tile_zero(2);
            if (Both) _tile_zero(3);
        } else {
            _tile_loadd(0, sums, 256);
            _tile_loadd(1, sums + 16, 256);
            if (Both) _tile_loadd(2, sums + 16 * 64, 256);
            if (Both) _tile_loadd(3, sums + 16 * 64 + 16, 256);
        }
        for (int64_t s = 0; s < steps; ++s) {
            step<Both>(x + s * 64, stride, strip + s * 4096);
            if (!next) continue;
            for (int i = 0; i < 8; ++i) _mm_prefetch(next + s * 64 + i * stride, _MM_HINT_T1);
        }
        if (tail) step<Both>(tail, 64, strip + steps * 4096);
        _tile_stored(0, sums, 256);
        _tile_stored(1, sums + 16, 256);
        if (Both) _tile_stored(2, sums + 16 * 64, 256);
        if (Both) _tile_stored(3, sums + 16 * 64 + 16, 256);
    }

    template <bool Both>
    static inline __attribute__((always_inline)) void step(const char* x, int64_t stride, const char* strip) {
        _tile_loadd(4, x, stride);
        _tile_loadd(6, strip, 256);
        _tile_loadd(7, strip + 64, 256);
        Kind::upper();
        if (!Both) return;
        _tile_loadd(5, x + 16 * stride, stride);
        Kind::lower();
    }
};

struct Int8OfTiles {
    using Number = int32_t;
    static void upper() {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
    }
    static void lower() {
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
};

struct Bf16OfTiles {
    using Number = float;
    static void upper() {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
    }
    static void lower() {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
};

using Int8Tiles = Tiles<Int8OfTiles>;
using Bf16Tiles = Tiles<Bf16OfTiles>;

bool tiles_chosen();  // whether they are to be used: where there are any, unless told otherwise
