// What is done to each token by itself: normalisation, modulation, rounding to 8 bits, rotation, gates.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"

namespace {

constexpr float TINY = 7.8886090522e-31f;  // 2 to the -100: the smallest scale

// One row of numbers as int8, and its scale: the largest becomes 127. What is not finite makes the scale so.
template <class T>
float to_int8(const T* y, int64_t D, int8_t* out) {
    Vec top = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (int64_t d = 0; d < D; d += LANES) {
        const Vec x = read(y + d, first(D - d));
        top = _mm512_max_ps(top, _mm512_abs_ps(x));
        odd = _mm512_fmadd_ps(x, _mm512_setzero_ps(), odd);  // infinity times zero is not a number
    }
    const float scale = std::max(_mm512_reduce_max_ps(top) / 127.0f, TINY) + _mm512_reduce_add_ps(odd);
    const Vec times = splat(1.0f / scale);
    for (int64_t d = 0; d < D; d += LANES) {
        const Mask m = first(D - d);
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(read(y + d, m), times));
        _mm_mask_storeu_epi8(out + d, m, _mm512_cvtsepi32_epi8(whole));
    }
    return scale;
}

// (x - mean) / deviation of one row, into y.
template <class T>
void normalise(const T* x, int64_t D, float eps, float* y) {
    Vec sum = _mm512_setzero_ps();
    for (int64_t d = 0; d < D; d += LANES) sum = _mm512_add_ps(sum, read(x + d, first(D - d)));
    const Vec mean = splat(_mm512_reduce_add_ps(sum) / float(D));
    Vec squares = _mm512_setzero_ps();
    for (int64_t d = 0; d < D; d += LANES) {
        const Mask m = first(D - d);
        const Vec off = _mm512_maskz_sub_ps(m, read(x + d, m), mean);
        squares = _mm512_fmadd_ps(off, off, squares);
    }
    const Vec times = splat(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / float(D) + eps));
    for (int64_t d = 0; d < D; d += LANES) {
        const Mask m = first(D - d);
        write(y + d, _mm512_mul_ps(_mm512_sub_ps(read(x + d, m), mean), times), m);
    }
}

template <class T>
void norm(const T* x, int64_t stride, const T* shift, int64_t shift_stride, const T* scale, int64_t scale_stride,
          float one, int64_t rows_of_batch, T* out, int8_t* values, float* scales, int64_t rows, int64_t D, float eps) {
#pragma omp parallel
    {
        std::vector<float> y(D + LANES);
#pragma omp for
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t b = row / rows_of_batch;
            normalise(x + row * stride, D, eps, y.data());
            for (int64_t d = 0; d < D; d += LANES) {
                const Mask m = first(D - d);
                Vec v = read(y.data() + d, m);
                if (scale) v = _mm512_mul_ps(v, _mm512_add_ps(read(scale + b * scale_stride + d, m), splat(one)));
                if (shift) v = _mm512_add_ps(v, read(shift + b * shift_stride + d, m));
                if (values)
                    write(y.data() + d, v, m);
                else
                    write(out + row * D + d, v, m);
            }
            if (values) scales[row] = to_int8(y.data(), D, values + row * D);
        }
    }
}

template <class T>
inline Vec geglu_at(const T* x, int64_t d, int64_t D, Mask m) {
    return _mm512_mul_ps(read(x + d, m), gelu(read(x + D + d, m)));
}

template <class T>
void quantize(const T* x, int64_t stride, bool geglu_before, int8_t* values, float* scales, int64_t rows, int64_t D) {
#pragma omp parallel
    {
        std::vector<float> y(geglu_before ? D + LANES : 0);
#pragma omp for
        for (int64_t row = 0; row < rows; ++row) {
            if (!geglu_before) {
                scales[row] = to_int8(x + row * stride, D, values + row * D);
                continue;
            }
            for (int64_t d = 0; d < D; d += LANES) {
                const Mask m = first(D - d);
                write(y.data() + d, geglu_at(x + row * stride, d, D, m), m);
            }
            scales[row] = to_int8(y.data(), D, values + row * D);
        }
    }
}

template <class T>
void geglu(const T* x, int64_t stride, T* out, int64_t rows, int64_t D) {
#pragma omp parallel for
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t d = 0; d < D; d += LANES) {
            const Mask m = first(D - d);
            write(out + row * D + d, geglu_at(x + row * stride, d, D, m), m);
        }
}

// RMSNorm of one head of one token, then neighbouring pairs turned by an angle each.
template <class T>
void norm_and_turn(const T* x, const T* weight, const float* cos, const float* sin, T* out, int64_t D, float eps) {
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    Vec squares = _mm512_setzero_ps();
    for (int64_t d = 0; d < D; d += LANES) {
        const Vec v = read(x + d, first(D - d));
        squares = _mm512_fmadd_ps(v, v, squares);
    }
    const Vec times = splat(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / float(D) + eps));
    for (int64_t d = 0; d < D; d += LANES) {
        const Mask m = first(D - d), half = first((D - d) / 2) & 0xff;
        const Vec v = _mm512_mul_ps(_mm512_mul_ps(read(x + d, m), times), read(weight + d, m));
        const Vec c = _mm512_permutexvar_ps(twice, read(cos + d / 2, half));
        const Vec s = _mm512_permutexvar_ps(twice, read(sin + d / 2, half));
        const Vec other = _mm512_mul_ps(_mm512_permute_ps(v, 0xb1), s);
        write(out + d, _mm512_fmaddsub_ps(v, c, other), m);  // even c - odd s, odd c + even s
    }
}

template <class T>
void qk(const T* q, const T* k, const int64_t* strides, const T* q_weight, const T* k_weight, const float* cos,
        const float* sin, T* q_out, T* k_out, int64_t B, int64_t H, int64_t L, int64_t D, float eps) {
#pragma omp parallel for collapse(2)
    for (int64_t b = 0; b < B; ++b)
        for (int64_t l = 0; l < L; ++l)
            for (int64_t h = 0; h < H; ++h) {
                const float *c = cos + l * (D / 2), *s = sin + l * (D / 2);
                norm_and_turn(q + b * strides[0] + h * strides[1] + l * strides[2], q_weight, c, s,
                              q_out + b * strides[6] + h * strides[7] + l * strides[8], D, eps);
                norm_and_turn(k + b * strides[3] + h * strides[4] + l * strides[5], k_weight, c, s,
                              k_out + b * strides[9] + h * strides[10] + l * strides[11], D, eps);
            }
}

template <class T>
void gated(const T* x, int64_t x_stride, const T* gate, int64_t gate_stride, const T* update, int64_t update_stride,
           int64_t rows_of_batch, T* out, int64_t rows, int64_t D) {
#pragma omp parallel for
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t d = 0; d < D; d += LANES) {
            const Mask m = first(D - d);
            const Vec g = read(gate + (row / rows_of_batch) * gate_stride + d, m);
            write(out + row * D + d,
                  _mm512_fmadd_ps(g, read(update + row * update_stride + d, m), read(x + row * x_stride + d, m)), m);
        }
}

// Sums of some pixels, of what they are over a first guess of their mean, and of its squares.
struct Sums {
    double sum = 0, squares = 0;
};

// Sums of channels from c on over some pixels, as long in registers as they last.
template <int Vectors, class T>
void sums_of(const T* origin, int64_t C, int64_t c, int64_t begin, int64_t end, float* sum, float* squares) {
    Vec guess[Vectors], one[Vectors], two[Vectors];
    Mask m[Vectors];
    for (int i = 0; i < Vectors; ++i) {
        m[i] = first(C - c - LANES * i);
        guess[i] = read(origin + c + LANES * i, m[i]);
        one[i] = two[i] = _mm512_setzero_ps();
    }
    for (int64_t pixel = begin; pixel < end; ++pixel) {
        const T* at = origin + pixel * C + c;
        for (int i = 0; i < Vectors; ++i) {
            const Vec v = _mm512_sub_ps(read(at + LANES * i, m[i]), guess[i]);
            one[i] = _mm512_add_ps(one[i], v);
            two[i] = _mm512_fmadd_ps(v, v, two[i]);
        }
    }
    for (int i = 0; i < Vectors; ++i) {
        write(sum + LANES * i, one[i]);
        write(squares + LANES * i, two[i]);
    }
}

template <class T>
void group_norm(const T* x, int64_t groups, const T* weight, const T* bias, bool silu_after, T* out, int64_t B, int64_t C,
                int64_t pixels, float eps) {
    const int64_t width = C / groups, piece = 256, pieces = (pixels + piece - 1) / piece;
    std::vector<Sums> parts(B * pieces * groups);
    std::vector<float> times(B * C), plus(B * C);
#pragma omp parallel
    {
        std::vector<float> sum(C + LANES), squares(C + LANES);
#pragma omp for collapse(2)
        for (int64_t b = 0; b < B; ++b)
            for (int64_t p = 0; p < pieces; ++p) {
                const T* origin = x + b * pixels * C;  // the first pixel is the guess
                const int64_t begin = p * piece, end = std::min(pixels, begin + piece);
                int64_t c = 0;
                for (; c + 4 * LANES <= C; c += 4 * LANES) sums_of<4>(origin, C, c, begin, end, &sum[c], &squares[c]);
                for (; c < C; c += LANES) sums_of<1>(origin, C, c, begin, end, &sum[c], &squares[c]);
                // Of a group, whose channels have guesses of their own: around the guess of its first channel.
                const double count = double(end - begin);
                Sums* of = &parts[(b * pieces + p) * groups];
                for (c = 0; c < C; ++c) {
                    const double off = double(number(origin[c])) - double(number(origin[c / width * width]));
                    Sums& part = of[c / width];
                    part.sum += double(sum[c]) + count * off;
                    part.squares += double(squares[c]) + 2 * off * double(sum[c]) + count * off * off;
                }
            }
#pragma omp for
        for (int64_t b = 0; b < B; ++b)
            for (int64_t g = 0; g < groups; ++g) {
                Sums all;
                for (int64_t p = 0; p < pieces; ++p) {
                    all.sum += parts[(b * pieces + p) * groups + g].sum;
                    all.squares += parts[(b * pieces + p) * groups + g].squares;
                }
                const double count = double(pixels) * double(width), off = all.sum / count;
                const double mean = off + double(number(x[b * pixels * C + g * width]));
                const double deviation = std::sqrt(std::max(0.0, all.squares / count - off * off) + double(eps));
                for (int64_t c = g * width; c < (g + 1) * width; ++c) {
                    const double factor = double(number(weight[c])) / deviation;
                    times[b * C + c] = float(factor);
                    plus[b * C + c] = float(double(number(bias[c])) - mean * factor);
                }
            }
#pragma omp for collapse(2)
        for (int64_t b = 0; b < B; ++b)
            for (int64_t i = 0; i < pixels; ++i)
                for (int64_t c = 0; c < C; c += LANES) {
                    const Mask m = first(C - c);
                    const int64_t at = (b * pixels + i) * C + c;
                    const Vec v = _mm512_fmadd_ps(read(x + at, m), read(times.data() + b * C + c, m), read(plus.data() + b * C + c, m));
                    write(out + at, silu_after ? silu(v) : v, m);
                }
    }
}

}  // namespace

// `wide` says that numbers are float32, not bfloat16. Strides are in numbers; what has none is dense.
#define BOTH(call)                 \
    if (wide) {                    \
        using T = f32;             \
        call;                      \
    } else {                       \
        using T = bf16;            \
        call;                      \
    }
#define IN(p) static_cast<const T*>(p)
#define OUT(p) static_cast<T*>(p)

extern "C" {

// LayerNorm of rows (rows, D), then times (`one` + scale) plus shift, either of which may be missing, with a row for
// each batch -> out (rows, D), or int8 values and scales.
void flux_norm(const void* x, int64_t stride, const void* shift, int64_t shift_stride, const void* scale,
               int64_t scale_stride, float one, int64_t rows_of_batch, void* out, int8_t* values, float* scales, int wide,
               int64_t rows, int64_t D, float eps) {
    BOTH(norm(IN(x), stride, IN(shift), shift_stride, IN(scale), scale_stride, one, rows_of_batch, OUT(out), values, scales,
              rows, D, eps))
}

// (rows, D) -> int8 values and scales; with `geglu_before` of GEGLU's results of (rows, 2 D).
void flux_quantize(const void* x, int64_t stride, int geglu_before, int8_t* values, float* scales, int wide,
                   int64_t rows, int64_t D) {
    BOTH(quantize(IN(x), stride, bool(geglu_before), values, scales, rows, D))
}

// (rows, 2 D) -> (rows, D): the first half times the GELU of the second.
void flux_geglu(const void* x, int64_t stride, void* out, int wide, int64_t rows, int64_t D) {
    BOTH(geglu(IN(x), stride, OUT(out), rows, D))
}

// RMSNorm and rotation of q and k (B, H, L, D). Strides of q, k and the two results for B, H and L. D is even.
void flux_qk_norm_rotary(const void* q, const void* k, const int64_t* strides, const void* q_weight,
                         const void* k_weight, const float* cos, const float* sin, void* q_out, void* k_out, int wide,
                         int64_t B, int64_t H, int64_t L, int64_t D, float eps) {
    BOTH(qk(IN(q), IN(k), strides, IN(q_weight), IN(k_weight), cos, sin, OUT(q_out), OUT(k_out), B, H, L, D, eps))
}

// x + gate * update, of (rows, D), with a gate (D,) for each batch.
void flux_gated_residual(const void* x, int64_t x_stride, const void* gate, int64_t gate_stride, const void* update,
                         int64_t update_stride, int64_t rows_of_batch, void* out, int wide, int64_t rows, int64_t D) {
    BOTH(gated(IN(x), x_stride, IN(gate), gate_stride, IN(update), update_stride, rows_of_batch, OUT(out), rows, D))
}

// GroupNorm of (B, pixels, C), and SiLU behind it.
void flux_group_norm(const void* x, int64_t groups, const void* weight, const void* bias, int silu, void* out, int wide,
                     int64_t B, int64_t C, int64_t pixels, float eps) {
    BOTH(group_norm(IN(x), groups, IN(weight), IN(bias), bool(silu), OUT(out), B, C, pixels, eps))
}
}
