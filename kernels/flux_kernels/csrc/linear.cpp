// Linears, with all that is done to a sum before it is written: scales, bias, GELU, a gate and what it is added to.
#include "gemm.h"

namespace {

// out = residual + gate * gelu(sum * scale + bias), of which any part may be missing; the GELU is of columns from
// `gelu_from` on.
struct After {
    const float* weight_scale;  // (N,)
    const float* row_scale;     // (M,)
    const int32_t* row_sum;     // (M,)
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
inline void write_sum(const After& a, int64_t row, int64_t column, __m512i sum) {
    const Mask m = first(a.N - column);
    Vec y = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), splat(a.row_scale[row]));
    y = _mm512_mul_ps(y, read(a.weight_scale + column, m));
    write(static_cast<T*>(a.out) + row * a.out_stride + column, finish<T>(y, a, row, column, m), m);
}

template <class T, int Rows>
void write_int8(const After& a, int64_t row, int64_t column, __m512i (&sums)[Rows][4]) {
    for (int i = 0; i < Rows; ++i) {
        // 128 was added to every number of the weight.
        const __m512i extra = _mm512_set1_epi32(a.row_sum[row + i] * 128);
        for (int j = 0; j < 4 && column + LANES * j < a.N; ++j)
            write_sum<T>(a, row + i, column + LANES * j, _mm512_sub_epi32(sums[i][j], extra));
    }
}

template <int Rows>
void write_bf16(const After& a, int64_t row, int64_t column, __m512 (&sums)[Rows][4]) {
    for (int i = 0; i < Rows; ++i) {
        for (int j = 0; j < 4; ++j) {
            int64_t c = column + LANES * j;
            if (c >= a.N) break;
            Mask m = first(a.N - c);
            write(static_cast<bf16*>(a.out) + (row + i) * a.out_stride + c, finish<bf16>(sums[i][j], a, row + i, c, m), m);
        }
    }
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
                      const void* residual, int64_t residual_stride, const void* gate, int64_t gate_stride, int64_t rows_of_batch, void* out,
                      int64_t out_stride, int wide, int64_t M, int64_t N, int64_t K) {
    std::unique_ptr<int32_t[]> sums(new int32_t[M]);
#pragma omp parallel for if (M * K > 65536)
    for (int64_t i = 0; i < M; ++i) sums[i] = sum_of(x + i * x_stride, K);
    After a{weight_scale, row_scale,   sums.get(), bias,          bool(bias_wide), gelu_from, residual,
            gate,         residual_stride, gate_stride, rows_of_batch, out,             out_stride, N};
    if (wide)
        product<Int8>(x, x_stride, w, w_stride, M, N, K,
                      [&](int64_t row, int64_t column, auto& s) { write_int8<f32>(a, row, column, s); });
    else
        product<Int8>(x, x_stride, w, w_stride, M, N, K,
                      [&](int64_t row, int64_t column, auto& s) { write_int8<bf16>(a, row, column, s); });
}

// The same of a product that there is already, int32, rows dense: what a processor with a unit for matrices is left to do.
void flux_int8_finish(const int32_t* sums, const float* row_scale, const float* weight_scale, const void* bias, int bias_wide,
                      int64_t gelu_from, const void* residual, int64_t residual_stride, const void* gate,
                      int64_t gate_stride, int64_t rows_of_batch, void* out, int64_t out_stride, int wide, int64_t M,
                      int64_t N) {
    After a{weight_scale, row_scale,       nullptr,     bias,          bool(bias_wide), gelu_from, residual,
            gate,         residual_stride, gate_stride, rows_of_batch, out,             out_stride, N};
#pragma omp parallel for
    for (int64_t row = 0; row < M; ++row)
        for (int64_t column = 0; column < N; column += LANES) {
            const __m512i sum = _mm512_maskz_loadu_epi32(first(N - column), sums + row * N + column);
            if (wide)
                write_sum<f32>(a, row, column, sum);
            else
                write_sum<bf16>(a, row, column, sum);
        }
}

// The same of bfloat16 numbers without scales. K is even.
void flux_bf16_linear(const bf16* x, int64_t x_stride, const bf16* w, int64_t w_stride, const void* bias, int bias_wide,
                      int64_t gelu_from, const void* residual, int64_t residual_stride, const void* gate, int64_t gate_stride,
                      int64_t rows_of_batch, void* out, int64_t out_stride, int64_t M, int64_t N, int64_t K) {
    After a{nullptr, nullptr,         nullptr,     bias,          bool(bias_wide), gelu_from, residual,
            gate,    residual_stride, gate_stride, rows_of_batch, out,             out_stride, N};
    product<Bf16>(x, 2 * x_stride, w, 2 * w_stride, M, N, K,
                  [&](int64_t row, int64_t column, auto& s) { write_bf16(a, row, column, s); });
}
}
