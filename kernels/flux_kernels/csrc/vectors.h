// A block of 6 rows and 64 columns by AVX-512, whose sums stay in registers while K is walked.
#pragma once

#include <utility>

#include "simd.h"

// f(0), f(1), ... with numbers that are constants, so that what they are indices of stays in registers.
template <class F, int... I>
inline __attribute__((always_inline)) void each(F f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>()), ...);
}
template <int Count, class F>
inline __attribute__((always_inline)) void each(F f) {
    each(f, std::make_integer_sequence<int, Count>());
}

// A way to multiply, which gemm.h tells what it is. Kind: what is done with a register.
template <class Kind>
struct Vectors : Kind {
    using Number = typename Kind::Number;
    static constexpr int ROWS = 6;
    // Bytes of a row that a strip holds: 64 stay in the second-level cache. One strip at a time will do.
    static constexpr int64_t DEPTH = 6144, KEPT = 0;

    static void block(const char* x, int64_t stride, int rows, const char* strip, int64_t bytes, int, Number* sums,
                      bool fresh, const char* = nullptr) {
        switch (rows) {
            case 1: return some<1>(x, stride, strip, bytes / 4, sums, fresh);
            case 2: return some<2>(x, stride, strip, bytes / 4, sums, fresh);
            case 3: return some<3>(x, stride, strip, bytes / 4, sums, fresh);
            case 4: return some<4>(x, stride, strip, bytes / 4, sums, fresh);
            case 5: return some<5>(x, stride, strip, bytes / 4, sums, fresh);
            case 6: return some<6>(x, stride, strip, bytes / 4, sums, fresh);
        }
    }

    template <int Rows>
    static void some(const char* x, int64_t stride, const char* strip, int64_t steps, Number* sums, bool fresh) {
        typename Kind::Sum sum[Rows][4];
        each<Rows>([&](auto i) {
            each<4>([&](auto j) { sum[i][j] = fresh ? Kind::zero() : Kind::load(sums + i * 64 + j * LANES); });
        });
        for (int64_t s = 0; s < steps; ++s) {
            const __m512i w0 = _mm512_load_si512(strip), w1 = _mm512_load_si512(strip + 64);
            const __m512i w2 = _mm512_load_si512(strip + 128), w3 = _mm512_load_si512(strip + 192);
            strip += 256;
            each<Rows>([&](auto i) {
                int32_t four;
                std::memcpy(&four, x + i * stride + 4 * s, 4);
                const __m512i b = _mm512_set1_epi32(four);
                sum[i][0] = Kind::add(sum[i][0], w0, b);
                sum[i][1] = Kind::add(sum[i][1], w1, b);
                sum[i][2] = Kind::add(sum[i][2], w2, b);
                sum[i][3] = Kind::add(sum[i][3], w3, b);
            });
        }
        each<Rows>([&](auto i) { each<4>([&](auto j) { Kind::store(sums + i * 64 + j * LANES, sum[i][j]); }); });
    }
};

struct Int8OfVectors {
    using Number = int32_t;
    using Sum = __m512i;
    static Sum zero() { return _mm512_setzero_si512(); }
    // The instruction multiplies unsigned by signed numbers: the weight has 128 added, which is taken off the sums.
    static __m512i turned(__m512i w) { return _mm512_xor_si512(w, _mm512_set1_epi8(int8_t(0x80))); }
    static Sum add(Sum sum, __m512i w, __m512i x) { return _mm512_dpbusd_epi32(sum, w, x); }
    static Sum load(const Number* p) { return _mm512_load_si512(p); }
    static void store(Number* p, Sum s) { _mm512_store_si512(p, s); }
};

struct Bf16OfVectors {
    using Number = float;
    using Sum = __m512;
    static Sum zero() { return _mm512_setzero_ps(); }
    static __m512i turned(__m512i w) { return w; }
    static Sum add(Sum sum, __m512i w, __m512i x) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }
    static Sum load(const Number* p) { return _mm512_load_ps(p); }
    static void store(Number* p, Sum s) { _mm512_store_ps(p, s); }
};

using Int8Vectors = Vectors<Int8OfVectors>;
using Bf16Vectors = Vectors<Bf16OfVectors>;
