// Products of tokens with weights: a tile of 6 rows and 64 columns, whose sums stay in registers.
//
// The weight is (N, K), row by row, as it is stored. A strip of 64 of its rows is turned so that 16 columns of the
// result lie in one register, used for every row of tokens, and thrown away: that is a two-hundredth of the work for a
// thousand tokens, so no weight is kept twice. The order of a sum depends on K alone, so a token has the same bits in
// any batch and with any number of threads.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <utility>

#include "simd.h"

constexpr int ROWS = 6;        // of a tile
constexpr int COLUMNS = 64;    // of a tile: four registers
constexpr int64_t DEPTH = 6144;  // bytes of a row that a strip holds: 64 of them stay in the second-level cache

// Memory of a thread that stays with it: what is larger than 128 KB comes from the system anew every time, page by page.
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

// What a product is made of: K numbers of a row go into sums a step of four bytes at a time.
struct Int8 {
    using In = int8_t;
    using Sum = __m512i;
    static constexpr int STEP = 4;
    static Sum zero() { return _mm512_setzero_si512(); }
    // The instruction multiplies unsigned by signed numbers: the weight has 128 added, which `correct` takes off again.
    static __m512i turned(__m512i w) { return _mm512_xor_si512(w, _mm512_set1_epi8(int8_t(0x80))); }
    static Sum add(Sum sum, __m512i w, __m512i x) { return _mm512_dpbusd_epi32(sum, w, x); }
    static Sum load(const void* p) { return _mm512_load_si512(p); }
    static void store(void* p, Sum s) { _mm512_store_si512(p, s); }
};

struct Bf16 {
    using In = bf16;
    using Sum = __m512;
    static constexpr int STEP = 2;
    static Sum zero() { return _mm512_setzero_ps(); }
    static __m512i turned(__m512i w) { return w; }
    static Sum add(Sum sum, __m512i w, __m512i x) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }
    static Sum load(const void* p) { return _mm512_load_ps(static_cast<const float*>(p)); }
    static void store(void* p, Sum s) { _mm512_store_ps(static_cast<float*>(p), s); }
};

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

// `rows` (at most 64) rows of a matrix, `bytes` of each (a multiple of 4) -> (bytes / 4, 64) numbers of four bytes, with
// zeros, before they are turned, for rows that are not there.
template <class Kind>
void turn(const void* from, int64_t stride, int rows, int64_t bytes, void* to) {
    const char* source = static_cast<const char*>(from);
    char* target = static_cast<char*>(to);
    for (int group = 0; group < COLUMNS; group += 16) {
        for (int64_t at = 0; at < bytes; at += 64) {
            Mask some = first((bytes - at) / 4);
            __m512i r[16];
            for (int i = 0; i < 16; ++i)
                r[i] = Kind::turned(
                    group + i < rows ? _mm512_maskz_loadu_epi32(some, source + (group + i) * stride + at)
                                     : _mm512_setzero_si512());
            transpose16(r);
            int count = int(std::min<int64_t>(16, (bytes - at) / 4));
            for (int i = 0; i < count; ++i)
                _mm512_store_si512(target + (at / 4 + i) * (COLUMNS * 4) + group * 4, r[i]);
        }
    }
}

// f(0), f(1), ... with numbers that are constants, so that what they are indices of stays in registers.
template <class F, int... I>
inline __attribute__((always_inline)) void each(F f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>()), ...);
}
template <int Count, class F>
inline __attribute__((always_inline)) void each(F f) {
    each(f, std::make_integer_sequence<int, Count>());
}

// `Rows` rows of x times a turned strip, `steps` of four bytes, added to what `sums` holds.
template <class Kind, int Rows>
inline __attribute__((always_inline)) void tile(
    const void* x, int64_t stride, const void* strip, int64_t steps, typename Kind::Sum (&sums)[Rows][4]) {
    const char* a = static_cast<const char*>(x);
    const char* w = static_cast<const char*>(strip);
    typename Kind::Sum sum[Rows][4];  // of its own: what others may look at is written to memory at every step
    each<Rows>([&](auto i) { each<4>([&](auto j) { sum[i][j] = sums[i][j]; }); });
    for (int64_t s = 0; s < steps; ++s) {
        const __m512i w0 = _mm512_load_si512(w), w1 = _mm512_load_si512(w + 64);
        const __m512i w2 = _mm512_load_si512(w + 128), w3 = _mm512_load_si512(w + 192);
        w += 256;
        each<Rows>([&](auto i) {
            int32_t four;
            std::memcpy(&four, a + i * stride + 4 * s, 4);
            const __m512i b = _mm512_set1_epi32(four);
            sum[i][0] = Kind::add(sum[i][0], w0, b);
            sum[i][1] = Kind::add(sum[i][1], w1, b);
            sum[i][2] = Kind::add(sum[i][2], w2, b);
            sum[i][3] = Kind::add(sum[i][3], w3, b);
        });
    }
    each<Rows>([&](auto i) { each<4>([&](auto j) { sums[i][j] = sum[i][j]; }); });
}

// x (M, K) times the transpose of w (N, K). `done(row, column, sums)` gets every tile once, whole: its first row and
// column, and how many rows there are is its template argument.
template <class Kind, class Done>
void product(const void* x, int64_t x_stride, const void* w, int64_t w_stride, int64_t M, int64_t N, int64_t K, Done done) {
    using In = typename Kind::In;
    const int64_t bytes = K * int64_t(sizeof(In));
    const int64_t strips = (N + COLUMNS - 1) / COLUMNS;
    const int64_t pieces = (bytes + DEPTH - 1) / DEPTH;
    const int64_t depth = ((bytes + pieces - 1) / pieces + 63) / 64 * 64;
    const int64_t threads = omp_get_max_threads();
    // Few strips are cut by rows as well, so that no thread waits long for another.
    int64_t cuts = std::max<int64_t>(1, std::min<int64_t>(M / 192, (8 * threads + strips - 1) / strips));
    if (pieces > 1) cuts = std::max<int64_t>(cuts, (M + 767) / 768);
    const int64_t height = ((M + cuts - 1) / cuts + ROWS - 1) / ROWS * ROWS;

#pragma omp parallel for schedule(dynamic) collapse(2)
    for (int64_t strip = 0; strip < strips; ++strip) {
        for (int64_t cut = 0; cut < cuts; ++cut) {
            thread_local Scratch turned, kept;
            const int64_t top = cut * height, bottom = std::min(M, top + height), column = strip * COLUMNS;
            if (top >= bottom) continue;
            const int rows = int(std::min<int64_t>(COLUMNS, N - column));
            char* strip_of = static_cast<char*>(turned.get(size_t(depth) * COLUMNS));
            char* partial = pieces > 1 ? static_cast<char*>(kept.get(size_t(height) * COLUMNS * 4)) : nullptr;
            for (int64_t begin = 0; begin < bytes; begin += depth) {
                const int64_t some = std::min(depth, bytes - begin);
                turn<Kind>(static_cast<const char*>(w) + column * w_stride + begin, w_stride, rows, some, strip_of);
                const bool starts = begin == 0, ends = begin + depth >= bytes;
                auto rows_of = [&](auto count, int64_t row) {
                    constexpr int Rows = decltype(count)::value;
                    typename Kind::Sum sums[Rows][4];
                    char* at = partial + (row - top) * COLUMNS * 4;
                    for (int i = 0; i < Rows; ++i)
                        for (int j = 0; j < 4; ++j)
                            sums[i][j] = starts ? Kind::zero() : Kind::load(at + (i * 4 + j) * 64);
                    tile<Kind, Rows>(
                        static_cast<const char*>(x) + row * x_stride + begin, x_stride, strip_of, some / 4, sums);
                    if (ends) {
                        done(row, column, sums);
                        return;
                    }
                    for (int i = 0; i < Rows; ++i)
                        for (int j = 0; j < 4; ++j) Kind::store(at + (i * 4 + j) * 64, sums[i][j]);
                };
                int64_t row = top;
                for (; row + ROWS <= bottom; row += ROWS) rows_of(std::integral_constant<int, ROWS>(), row);
                switch (bottom - row) {
                    case 1: rows_of(std::integral_constant<int, 1>(), row); break;
                    case 2: rows_of(std::integral_constant<int, 2>(), row); break;
                    case 3: rows_of(std::integral_constant<int, 3>(), row); break;
                    case 4: rows_of(std::integral_constant<int, 4>(), row); break;
                    case 5: rows_of(std::integral_constant<int, 5>(), row); break;
                }
            }
        }
    }
}
