// Sixteen numbers at a time: reading and writing bfloat16 and float32, and the functions that the networks use.
//
// All arithmetic is float32; a result is rounded once, when it is written, to the nearest even as torch rounds.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

using f32 = float;
struct bf16 {
    uint16_t bits;
};

using Vec = __m512;
using Mask = __mmask16;

constexpr int LANES = 16;
constexpr int COLUMNS = 64;  // of a strip of a product

static inline Mask first(int64_t count) {
    return count >= LANES ? Mask(0xffff) : Mask((1u << count) - 1);
}

static inline Vec splat(float x) { return _mm512_set1_ps(x); }

static inline Vec read(const f32* p) { return _mm512_loadu_ps(p); }
static inline Vec read(const f32* p, Mask m) { return _mm512_maskz_loadu_ps(m, p); }
static inline Vec read(const bf16* p) {
    __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
static inline Vec read(const bf16* p, Mask m) {
    __m256i half = _mm256_maskz_loadu_epi16(m, p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

static inline void write(f32* p, Vec x) { _mm512_storeu_ps(p, x); }
// Whole ones without a mask, whose stores are slow.
static inline void write(f32* p, Vec x, Mask m) {
    if (m == 0xffff)
        write(p, x);
    else
        _mm512_mask_storeu_ps(p, m, x);
}
static inline void write(bf16* p, Vec x) {
    __m256bh half = _mm512_cvtneps_pbh(x);
    std::memcpy(p, &half, 32);
}
static inline void write(bf16* p, Vec x, Mask m) {
    if (m == 0xffff) {
        write(p, x);
        return;
    }
    __m256bh half = _mm512_cvtneps_pbh(x);
    __m256i bits;
    std::memcpy(&bits, &half, 32);
    _mm256_mask_storeu_epi16(p, m, bits);
}

static inline float number(f32 x) { return x; }
static inline float number(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

// 2 to the power of x: a polynomial of degree 5 on the fraction, 1e-7 relative. Below -126 it is 2 to the -126. What is
// not a number stays so: of two operands the maximum takes the second then.
static inline Vec exp2(Vec x) {
    x = _mm512_max_ps(splat(-126.0f), x);
    Vec whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    Vec part = _mm512_sub_ps(x, whole);  // [-0.5, 0.5]
    Vec y = splat(1.32647269e-3f);
    y = _mm512_fmadd_ps(y, part, splat(9.67151266e-3f));
    y = _mm512_fmadd_ps(y, part, splat(5.55073374e-2f));
    y = _mm512_fmadd_ps(y, part, splat(2.40222421e-1f));
    y = _mm512_fmadd_ps(y, part, splat(6.93146978e-1f));
    y = _mm512_fmadd_ps(y, part, splat(1.0f));
    return _mm512_scalef_ps(y, whole);
}

static inline Vec exp(Vec x) { return exp2(_mm512_mul_ps(x, splat(1.44269504f))); }

static inline Vec sigmoid(Vec x) {
    Vec e = exp(_mm512_min_ps(splat(88.0f), _mm512_sub_ps(splat(0.0f), x)));
    return _mm512_div_ps(splat(1.0f), _mm512_add_ps(splat(1.0f), e));
}

static inline Vec silu(Vec x) { return _mm512_mul_ps(x, sigmoid(x)); }

// GELU in its tanh approximation, which is x times the sigmoid of twice the argument of the tanh.
static inline Vec gelu_tanh(Vec x) {
    Vec cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
    Vec inner = _mm512_fmadd_ps(cube, splat(0.044715f), x);
    return _mm512_mul_ps(x, sigmoid(_mm512_mul_ps(inner, splat(1.5957691216f))));
}

// The error function to 1.5e-7 (Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26).
static inline Vec erf(Vec x) {
    Vec size = _mm512_abs_ps(x);
    Vec t = _mm512_div_ps(splat(1.0f), _mm512_fmadd_ps(size, splat(0.3275911f), splat(1.0f)));
    Vec y = splat(1.061405429f);
    y = _mm512_fmadd_ps(y, t, splat(-1.453152027f));
    y = _mm512_fmadd_ps(y, t, splat(1.421413741f));
    y = _mm512_fmadd_ps(y, t, splat(-0.284496736f));
    y = _mm512_fmadd_ps(y, t, splat(0.254829592f));
    y = _mm512_mul_ps(y, t);
    Vec e = exp(_mm512_sub_ps(splat(0.0f), _mm512_mul_ps(size, size)));
    Vec positive = _mm512_fnmadd_ps(y, e, splat(1.0f));
    Vec sign = _mm512_and_ps(x, splat(-0.0f));
    return _mm512_or_ps(positive, sign);
}

static inline Vec gelu(Vec x) {
    Vec half = _mm512_mul_ps(x, splat(0.5f));
    return _mm512_fmadd_ps(half, erf(_mm512_mul_ps(x, splat(0.70710678f))), half);
}
