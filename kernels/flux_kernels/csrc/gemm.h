// Products of tokens with weights, some rows and 64 columns at a time: by tiles (tiles.h) or registers (vectors.h).
//
// The weight is (N, K), row by row, as it is stored. A strip of 64 of its rows is turned so that 16 columns of the
// result lie in one register, or 16 of them in a tile, used for every row of tokens, and thrown away: that is a
// two-hundredth of the work for a thousand tokens, by tiles a twentieth, so no weight is kept twice. The order of a sum
// depends on K alone, so a token has the same bits in any batch and with any number of threads.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "tiles.h"
#include "vectors.h"

// Memory of a thread that stays with it, one for each number: what is larger than 128 KB comes from the system anew
// every time, page by page.
struct Scratch {
    void* data = nullptr;
    size_t size = 0;
    void* get(size_t bytes) {
        if (bytes > size) {
            std::free(data);
            size = (bytes + 4095) / 4096 * 4096;
            data = std::aligned_alloc(4096, size);
            if (!data) std::abort();
        }
        return data;
    }
    ~Scratch() { std::free(data); }
};
template <int>
Scratch& scratch() {
    thread_local Scratch one;
    return one;
}

// rows[i] -> columns: 16 x 16 numbers of four bytes.
static inline void transpose16(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

// `rows` (at most 64) rows of a matrix, `bytes` of each (a multiple of 4) -> (bytes / 4, 64) numbers of four bytes,
// with zeros, before they are turned, for rows and bytes that are not there: up to a multiple of 64 bytes.
template <class Unit>
void turn(const void* from, int64_t stride, int rows, int64_t bytes, void* to) {
    const char* source = static_cast<const char*>(from);
    char* target = static_cast<char*>(to);
    for (int group = 0; group < COLUMNS; group += 16) {
        for (int64_t at = 0; at < bytes; at += 64) {
            Mask some = first((bytes - at) / 4);
            __m512i r[16];
            for (int i = 0; i < 16; ++i)
                r[i] = Unit::turned(
                    group + i < rows ? _mm512_maskz_loadu_epi32(some, source + (group + i) * stride + at)
                                     : _mm512_setzero_si512());
            transpose16(r);
            for (int i = 0; i < 16; ++i)
                _mm512_store_si512(target + (at / 4 + i) * (COLUMNS * 4) + group * 4, r[i]);
        }
    }
}

// x (M, K) times the transpose of w (N, K), strides and `bytes` of a row in bytes. `done(row, column, rows, sums)` gets
// every block once, whole: its first row and column, how many rows there are, and 64 sums for each.
template <class Unit, class Done>
void product(const void* x, int64_t x_stride, const void* w, int64_t w_stride, int64_t M, int64_t N, int64_t bytes,
             Done done) {
    using Number = typename Unit::Number;
    constexpr int ROWS = Unit::ROWS;
    const int64_t pieces = (bytes + Unit::DEPTH - 1) / Unit::DEPTH;
    const int64_t depth = ((bytes + pieces - 1) / pieces + 63) / 64 * 64;
    const int64_t threads = omp_get_max_threads(), strips = (N + COLUMNS - 1) / COLUMNS;
    const int64_t most = std::min(Unit::KEPT / (COLUMNS * depth), strips / (2 * threads));
    const int64_t wide = std::max<int64_t>(1, most);  // strips of a panel, for which x is read once
    const int64_t panels = (strips + wide - 1) / wide;
    // Few panels are cut by rows as well, so that no thread waits long for another.
    int64_t cuts = std::max<int64_t>(1, std::min<int64_t>(M / 192, (8 * threads + panels - 1) / panels));
    if (pieces > 1) cuts = std::max<int64_t>(cuts, (M + 767) / 768);
    const int64_t height = ((M + cuts - 1) / cuts + ROWS - 1) / ROWS * ROWS;
    const int64_t kept_rows = pieces > 1 ? height : ROWS;  // sums of how many rows are kept for the next piece

#pragma omp parallel
    {
        Unit unit;
        Scratch& turned = scratch<0>();
        Scratch& kept = scratch<1>();
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t panel = 0; panel < panels; ++panel) {
            for (int64_t cut = 0; cut < cuts; ++cut) {
                const int64_t top = cut * height, bottom = std::min(M, top + height);
                const int64_t left = panel * wide * COLUMNS, right = std::min(N, left + wide * COLUMNS);
                if (top >= bottom) continue;
                char* strip = static_cast<char*>(turned.get(size_t(depth) * wide * COLUMNS));
                Number* sums = static_cast<Number*>(kept.get(size_t(kept_rows) * wide * COLUMNS * 4));
                for (int64_t begin = 0; begin < bytes; begin += depth) {
                    const int64_t some = std::min(depth, bytes - begin);
                    const auto there = [&](int64_t column) { return int(std::min<int64_t>(COLUMNS, right - column)); };
                    for (int64_t column = left; column < right; column += COLUMNS)
                        turn<Unit>(static_cast<const char*>(w) + column * w_stride + begin, w_stride, there(column),
                                   some, strip + (column - left) * depth);
                    const char* from = static_cast<const char*>(x) + begin;
                    for (int64_t row = top; row < bottom; row += ROWS) {
                        const int rows = int(std::min<int64_t>(ROWS, bottom - row));
                        for (int64_t column = left; column < right; column += COLUMNS) {
                            // Of the next rows of x, 16 are fetched beside every strip.
                            const int64_t ahead = row + ROWS + (column - left) / COLUMNS * 16;
                            const bool fetched = ahead < row + 2 * ROWS && ahead + 16 <= bottom;
                            Number* at = sums + (column - left) * kept_rows + (row - top) % kept_rows * COLUMNS;
                            unit.block(from + row * x_stride, x_stride, rows, strip + (column - left) * depth, some,
                                       there(column), at, begin == 0, fetched ? from + ahead * x_stride : nullptr);
                            if (begin + depth >= bytes) done(row, column, rows, at);
                        }
                    }
                }
            }
        }
    }
}
