// softmax(q k^T / sqrt(D)) v, some queries and some keys at a time (arXiv 2205.14135), in bfloat16 with float32 sums.
#include <cmath>

#include "gemm.h"

namespace {

constexpr int QUERIES = 96;  // of a task
constexpr int KEYS = 256;    // at a time

struct Heads {
    const bf16* data;
    int64_t batch, head, row;  // strides in numbers; the last axis is dense
    const bf16* at(int64_t b, int64_t h, int64_t l) const { return data + b * batch + h * head + l * row; }
};

// 64 columns of v, from two rows at a time: (keys / 2, 64, 2).
void pair_up(const bf16* v, int64_t stride, int64_t keys, int columns, bf16* to) {
    alignas(64) static const uint16_t low[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                 8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low_half = _mm512_load_si512(low);
    const __m512i high_half = _mm512_add_epi16(low_half, _mm512_set1_epi16(16));
    for (int64_t key = 0; key < keys; key += 2) {
        for (int half = 0; half < COLUMNS; half += 32) {
            const int left = columns - half;
            const __mmask32 m = left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0;
            const bf16* p = v + key * stride + half;
            const __m512i one = _mm512_maskz_loadu_epi16(m, p);
            const __m512i two = key + 1 < keys ? _mm512_maskz_loadu_epi16(m, p + stride) : _mm512_setzero_si512();
            bf16* t = to + key * COLUMNS + half * 2;
            _mm512_store_si512(t, _mm512_permutex2var_epi16(one, low_half, two));
            _mm512_store_si512(t + 32, _mm512_permutex2var_epi16(one, high_half, two));
        }
    }
}

struct Task {
    const bf16* q;
    int64_t q_stride;
    const char* k;  // strips of 64 keys, turned, `k_row` bytes for each
    const char* v;  // strips of 64 columns, rows in pairs
    bf16* out;
    int64_t out_stride;
    int rows;
    int64_t keys, padded, D, k_row;
};

// f(first row, number of rows) for all of them, a block at a time.
template <class Unit, class F>
inline void by_blocks(int rows, F f) {
    for (int row = 0; row < rows; row += Unit::ROWS) f(row, std::min(Unit::ROWS, rows - row));
}

template <class Unit>
void attend(const Task& t, Unit& unit) {
    const int64_t wide = (t.D + COLUMNS - 1) / COLUMNS;  // strips of v
    // Scores, their exponentials in bfloat16, sums of rows of v, then for each row its largest score of this block.
    char* memory = static_cast<char*>(
        scratch<0>().get(QUERIES * (size_t(KEYS) * 4 + KEYS * 2 + size_t(wide) * COLUMNS * 4 + LANES * 4)));
    float* scores = reinterpret_cast<float*>(memory);
    float* sums = scores + QUERIES * KEYS;
    float* tops = sums + QUERIES * wide * COLUMNS;
    bf16* shares = reinterpret_cast<bf16*>(tops + QUERIES * LANES);
    float largest[QUERIES], total[QUERIES];
    const float factor = 1.44269504f / std::sqrt(float(t.D));

    for (int64_t begin = 0; begin < t.keys; begin += KEYS) {
        const int64_t some = std::min<int64_t>(KEYS, t.keys - begin);
        const int64_t strips = (some + COLUMNS - 1) / COLUMNS;
        for (int64_t s = 0; s < strips; ++s) {
            const char* strip = t.k + (begin + s * COLUMNS) * t.k_row;
            const int64_t there = some - s * COLUMNS;
            by_blocks<Unit>(t.rows, [&](int row, int rows) {
                float* at = scores + (s * QUERIES + row) * COLUMNS;
                unit.block(reinterpret_cast<const char*>(t.q + row * t.q_stride), t.q_stride * 2, rows, strip, t.D * 2,
                           COLUMNS, at, true);
                for (int i = 0; i < rows; ++i, at += COLUMNS) {
                    float* top = tops + (row + i) * LANES;
                    Vec best = s ? _mm512_load_ps(top) : splat(-INFINITY);
                    for (int j = 0; j < COLUMNS; j += LANES) {
                        Vec y = _mm512_load_ps(at + j);
                        if (there < COLUMNS) {  // keys that are not there
                            y = _mm512_mask_mov_ps(splat(-INFINITY), first(std::max<int64_t>(0, there - j)), y);
                            _mm512_store_ps(at + j, y);
                        }
                        best = _mm512_max_ps(best, y);
                    }
                    _mm512_store_ps(top, best);
                }
            });
        }
        for (int row = 0; row < t.rows; ++row) {
            const float top = _mm512_reduce_max_ps(_mm512_load_ps(tops + row * LANES));
            const float now = begin ? std::max(largest[row], top) : top;
            const Vec offset = splat(now * factor), times = splat(factor);
            Vec sum = _mm512_setzero_ps();
            for (int64_t i = 0; i < strips * COLUMNS; i += LANES) {
                const float* at = scores + ((i / COLUMNS) * QUERIES + row) * COLUMNS + i % COLUMNS;
                Vec p = exp2(_mm512_fmsub_ps(_mm512_load_ps(at), times, offset));
                sum = _mm512_add_ps(sum, p);
                write(shares + row * KEYS + i, p);
            }
            const float added = _mm512_reduce_add_ps(sum);
            if (begin) {
                const float shrunk = std::exp2((largest[row] - now) * factor);
                total[row] = total[row] * shrunk + added;
                if (shrunk != 1.0f)
                    for (int64_t s = 0; s < wide; ++s)
                        for (int j = 0; j < 4; ++j) {
                            float* at = sums + (s * QUERIES + row) * COLUMNS + LANES * j;
                            _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), splat(shrunk)));
                        }
            } else {
                total[row] = added;
            }
            largest[row] = now;
        }
        for (int64_t s = 0; s < wide; ++s) {
            const char* strip = t.v + (s * t.padded + begin) * COLUMNS * 2;
            by_blocks<Unit>(t.rows, [&](int row, int rows) {
                unit.block(reinterpret_cast<const char*>(shares + row * KEYS), KEYS * 2, rows, strip,
                           strips * COLUMNS * 2, COLUMNS, sums + (s * QUERIES + row) * COLUMNS, begin == 0);
            });
        }
    }
    for (int row = 0; row < t.rows; ++row) {
        const Vec share = splat(1.0f / total[row]);
        for (int64_t d = 0; d < t.D; d += LANES) {
            const float* at = sums + ((d / COLUMNS) * QUERIES + row) * COLUMNS + d % COLUMNS;
            write(t.out + row * t.out_stride + d, _mm512_mul_ps(_mm512_load_ps(at), share), first(t.D - d));
        }
    }
}

template <class Unit>
int attention(const bf16* q, const bf16* k, const bf16* v, bf16* out, const int64_t* strides, int64_t B, int64_t H,
              int64_t Lq, int64_t Lk, int64_t D) {
    const Heads qs{q, strides[0], strides[1], strides[2]}, ks{k, strides[3], strides[4], strides[5]};
    const Heads vs{v, strides[6], strides[7], strides[8]};
    const int64_t strips = (Lk + COLUMNS - 1) / COLUMNS, padded = strips * COLUMNS;
    const int64_t wide = (D + COLUMNS - 1) / COLUMNS, k_row = (D * 2 + 63) / 64 * 64;
    const size_t k_size = size_t(padded) * k_row, v_size = size_t(padded) * wide * COLUMNS * 2;
    char* memory = static_cast<char*>(std::aligned_alloc(64, B * H * (k_size + v_size)));
    if (!memory) return 1;
    char* const values = memory + B * H * k_size;
#pragma omp parallel
    {
        Unit unit;
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t head = 0; head < B * H; ++head) {
            for (int64_t s = 0; s < strips; ++s) {
                const int64_t b = head / H, h = head % H, row = s * COLUMNS;
                const int rows = int(std::min<int64_t>(COLUMNS, Lk - row));
                turn<Unit>(ks.at(b, h, row), ks.row * 2, rows, D * 2, memory + head * k_size + row * k_row);
                for (int64_t w = 0; w < wide; ++w) {
                    bf16* to = reinterpret_cast<bf16*>(values + head * v_size + (w * padded + row) * COLUMNS * 2);
                    pair_up(vs.at(b, h, row) + w * COLUMNS, vs.row, rows,
                            int(std::min<int64_t>(COLUMNS, D - w * COLUMNS)), to);
                    const int64_t full = (rows + 1) / 2 * 2;
                    std::memset(static_cast<void*>(to + full * COLUMNS), 0, size_t(COLUMNS - full) * COLUMNS * 2);
                }
            }
        }
        const int64_t blocks = (Lq + QUERIES - 1) / QUERIES;
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t head = 0; head < B * H; ++head) {
            for (int64_t block = 0; block < blocks; ++block) {
                const int64_t b = head / H, h = head % H, row = block * QUERIES;
                const Task task{qs.at(b, h, row), qs.row, memory + head * k_size, values + head * v_size,
                        out + b * strides[9] + h * strides[10] + row * strides[11], strides[11],
                        int(std::min<int64_t>(QUERIES, Lq - row)), Lk, padded, D, k_row};
                attend(task, unit);
            }
        }
    }
    std::free(memory);
    return 0;
}
}  // namespace

extern "C" {

// q (B, H, Lq, D), k and v (B, H, Lk, D) -> out (B, H, Lq, D), with any strides but of the last axis, which is 1.
// Strides are those of q, k, v and out for B, H and L in this order, in numbers. D is even. Returns 1 where memory is
// short.
int flux_attention(const bf16* q, const bf16* k, const bf16* v, bf16* out, const int64_t* strides, int64_t B, int64_t H,
                   int64_t Lq, int64_t Lk, int64_t D) {
    return (tiles_chosen() ? attention<Bf16Tiles> : attention<Bf16Vectors>)(q, k, v, out, strides, B, H, Lq, Lk, D);
}
}
