// Linears, with all that is done to a sum before it is written: scales, bias, GELU, a gate and what it is added to.
#include "gemm.h"

namespace {

// out = residual + gate * gelu(sum * scale + bias), of which any part may be missing; the GELU is of columns from
// `gelu_from` on.
struct After {
    const float* weight_scale;  // (N,)
    const float* row_scale;     // (M,)
    const int32_t* row_sum;     // (M,), or nothing where the weight is multiplied as it is
    const void* bias;           // (N,), in the dtype of the result or float32
    bool bias_wide;
    int64_t gelu_from;
    const void* residual;  // (M, N)
    const void* gate;      // (batches, N)
    int64_t residual_stride, gate_stride, rows_of_batch;
    void* out;
    int64_t out_stride;
    int64_t N;
};

template <class T>
inline Vec finish(Vec y, const After& a, int64_t row, int64_t column, Mask m) {
    if (a.bias) {
        Vec b = a.bias_wide ? read(static_cast<const float*>(a.bias) + column, m)
                            : read(static_cast<const T*>(a.bias) + column, m);
        y = _mm512_add_ps(y, b);
    }
    if (column >= a.gelu_from) y = gelu_tanh(y);
    if (a.residual) {
        Vec r = read(static_cast<const T*>(a.residual) + row * a.residual_stride + column, m);
        Vec g = a.gate
                    ? read(static_cast<const T*>(a.gate) + (row / a.rows_of_batch) * a.gate_stride + column, m)
                    : splat(1.0f);
        y = _mm512_fmadd_ps(g, y, r);
    }
    return y;
}

template <class T>
void write_int8(const After& a, int64_t row, int64_t column, __m512i sum) {
    const Mask m = first(a.N - column);
    Vec y = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), splat(a.row_scale[row]));
    y = _mm512_mul_ps(y, read(a.weight_scale + column, m));
    write(static_cast<T*>(a.out) + row * a.out_stride + column, finish<T>(y, a, row, column, m), m);
}

template <class Unit, class T>
void int8_linear(const After& a, const int8_t* x, int64_t x_stride, const int8_t* w, int64_t w_stride, int64_t M,
                 int64_t K) {
    product<Unit>(x, x_stride, w, w_stride, M, a.N, K, [&](int64_t row, int64_t column, int rows, const int32_t* sums) {
        for (int i = 0; i < rows; ++i) {
            // Vectors have 128 added to every number of the weight.
            const __m512i extra = _mm512_set1_epi32(a.row_sum ? a.row_sum[row + i] * 128 : 0);
            for (int j = 0; j < COLUMNS && column + j < a.N; j += LANES) {
                const __m512i sum = _mm512_load_si512(sums + i * COLUMNS + j);
                write_int8<T>(a, row + i, column + j, _mm512_sub_epi32(sum, extra));
            }
        }
    });
}

template <class Unit>
void bf16_linear(const After& a, const bf16* x, int64_t x_stride, const bf16* w, int64_t w_stride, int64_t M,
                 int64_t K) {
    product<Unit>(x, 2 * x_stride, w, 2 * w_stride, M, a.N, 2 * K,
                  [&](int64_t row, int64_t column, int rows, const float* sums) {
        for (int i = 0; i < rows; ++i)
            for (int64_t j = 0; j < COLUMNS && column + j < a.N; j += LANES) {
                const int64_t c = column + j;
                const Mask m = first(a.N - c);
                const Vec y = finish<bf16>(_mm512_load_ps(sums + i * COLUMNS + j), a, row + i, c, m);
                write(static_cast<bf16*>(a.out) + (row + i) * a.out_stride + c, y, m);
            }
    });
}

int32_t sum_of(const int8_t* x, int64_t count) {
    __m512i sum = _mm512_setzero_si512();
    const __m512i ones = _mm512_set1_epi8(1);
    for (int64_t i = 0; i < count; i += 64) {
        __mmask64 m = count - i >= 64 ? ~0ull : (1ull << (count - i)) - 1;
        sum = _mm512_dpbusd_epi32(sum, ones, _mm512_maskz_loadu_epi8(m, x + i));
    }
    return _mm512_reduce_add_epi32(sum);
}

}  // namespace

extern "C" {

// x (M, K) int8 with row_scale (M,), w (N, K) int8 with weight_scale (N,) -> out (M, N), bfloat16 or float32 (`wide`).
// Strides are in numbers; `gelu_from` is a multiple of 16. K is a multiple of 4.
void flux_int8_linear(const int8_t* x, int64_t x_stride, const float* row_scale, const int8_t* w, int64_t w_stride,
                      const float* weight_scale, const void* bias, int bias_wide, int64_t gelu_from,
                      const void* residual, int64_t residual_stride, const void* gate, int64_t gate_stride,
                      int64_t rows_of_batch, void* out, int64_t out_stride, int wide, int64_t M, int64_t N, int64_t K) {
    const bool tiles = tiles_chosen();
    std::unique_ptr<int32_t[]> sums(tiles ? nullptr : new int32_t[M]);
    if (!tiles) {
#pragma omp parallel for if (M * K > 65536)
        for (int64_t i = 0; i < M; ++i) sums[i] = sum_of(x + i * x_stride, K);
    }
    const After a{weight_scale, row_scale,       sums.get(),  bias,          bool(bias_wide), gelu_from, residual,
                  gate,         residual_stride, gate_stride, rows_of_batch, out,             out_stride, N};
    const auto linear = tiles ? (wide ? int8_linear<Int8Tiles, f32> : int8_linear<Int8Tiles, bf16>)
                              : (wide ? int8_linear<Int8Vectors, f32> : int8_linear<Int8Vectors, bf16>);
    linear(a, x, x_stride, w, w_stride, M, K);
}

// The same of bfloat16 numbers without scales. K is even.
void flux_bf16_linear(const bf16* x, int64_t x_stride, const bf16* w, int64_t w_stride, const void* bias, int bias_wide,
                      int64_t gelu_from, const void* residual, int64_t residual_stride, const void* gate,
                      int64_t gate_stride, int64_t rows_of_batch, void* out, int64_t out_stride, int64_t M, int64_t N,
                      int64_t K) {
    const After a{nullptr, nullptr,         nullptr,     bias,          bool(bias_wide), gelu_from, residual,
                  gate,    residual_stride, gate_stride, rows_of_batch, out,             out_stride, N};
    const auto linear = tiles_chosen() ? bf16_linear<Bf16Tiles> : bf16_linear<Bf16Vectors>;
    linear(a, x, x_stride, w, w_stride, M, K);
}
}
