/* What all files share: products of bfloat16 matrices, and what is done to rows of numbers. For processors with AVX-512 for bfloat16; AMX is
 * used where there is one.
 *
 * Everything is multiplied by `product`: A, rows of bfloat16, with B, which lies in panels of 16 columns, [K / 2][16][2] each, as
 * both instructions want it. A row's result never hangs on the rows beside it. */
#pragma once
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

enum { PANEL = 16, TILE = 16, PAIR = 2 * PANEL };

static inline int up_to(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }
static inline int smaller(int a, int b) { return a < b ? a : b; }

/* C <- A B, or C + A B if `add`: M rows, P panels, K even. `panel`: from one panel to the next. `tiles`: AMX may be used, if there is one; then
 * K is a multiple of 32, and rows of A and C up to a multiple of 16 must be there; those of C are written. */
void product(int M, int P, int K, const bf16 *a, long lda, const bf16 *b, long panel, float *c, long ldc, int add, int tiles);
void begin_tiles(void); /* each thread, before it multiplies */
void end_tiles(void);

/* exp(x) to 2 units in the last place: 2^n times a polynomial (Cephes). 0 below -87, where floats lose digits and processors time; a NaN
 * stays one. */
static inline __m512 exponential(__m512 x) {
    const __m512 least = _mm512_set1_ps(-87.0f);
    const __mmask16 real = _mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ);
    x = _mm512_max_ps(least, x);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    const float factors[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    __m512 y = _mm512_set1_ps(1.9875691500e-4f);
    for (int i = 0; i < 5; i++) y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(factors[i]));
    y = _mm512_add_ps(_mm512_fmadd_ps(y, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(real, y, n);
}

/* 1 + exp(-x), by which 1 is the sigmoid and x the swish */
static inline __m512 logistic(__m512 x) { return _mm512_add_ps(_mm512_set1_ps(1.0f), exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))); }

/* Which of the next 16 there are, where so many are left */
static inline __mmask16 mask_of(int left) { return left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0; }

static inline void store_bf16(bf16 *into, __m512 x) { _mm256_storeu_si256((__m256i *)into, (__m256i)_mm512_cvtneps_pbh(x)); }
static inline void keep_bf16(bf16 *into, __mmask16 real, __m512 x) { _mm256_mask_storeu_epi16(into, real, (__m256i)_mm512_cvtneps_pbh(x)); }
static inline __m512 load_bf16(__mmask16 real, const bf16 *x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(real, x)), 16));
}

static inline float from_bf16(bf16 x) {
    const uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

/* n floats, rounded */
static inline void store_row(bf16 *into, const float *x, int n) {
    for (int i = 0; i < n; i += 16) keep_bf16(into + i, mask_of(n - i), _mm512_maskz_loadu_ps(mask_of(n - i), x + i));
}

/* n bfloat16 numbers as floats, and zeros up to `width` */
static inline void read_row(float *into, const bf16 *x, int n, int width) {
    for (int i = 0; i < width; i += 16) _mm512_storeu_ps(into + i, load_bf16(mask_of(n - i), x + i));
}

/* A row becomes a column of a right side [.., 16 columns][n / 2][16][2] */
static inline void put_across(bf16 *side, const bf16 *x, int column, int n) {
    bf16 *to = side + (long)(column / PANEL) * PANEL * n + column % PANEL * 2;
    for (int k = 0; k < n; k += 2, to += PAIR) memcpy(to, x + k, 4);
}

/* A row of a right side [n / 16][rows / 2][16][2] */
static inline void put_down(bf16 *side, const bf16 *x, int row, int n, int rows) {
    bf16 *to = side + row / 2 * PAIR + row % 2;
    for (int panel = 0; panel < n; panel += PANEL, to += (long)rows * PANEL)
        for (int k = 0; k < PANEL; k++) to[2 * k] = x[panel + k];
}

/* The next `bytes` of a room, from a multiple of 64 on; NULL where it is only measured. */
static inline void *carve(char *base, size_t *used, size_t bytes) {
    const size_t start = *used;
    *used += (bytes + 63) / 64 * 64;
    return base ? base + start : NULL;
}

static inline float inverse_rms(const float *x, int n, float eps) {
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < n; i += 16) {
        const __m512 v = _mm512_maskz_loadu_ps(mask_of(n - i), x + i);
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    return 1.0f / sqrtf(_mm512_reduce_add_ps(sum) / n + eps);
}

/* RMS norm of a row, in bfloat16, with zeros up to `width` */
static inline void norm_row(bf16 *into, const float *x, const float *weight, int n, int width, float eps) {
    const __m512 factor = _mm512_set1_ps(inverse_rms(x, n, eps));
    for (int i = 0; i < width; i += 16) {
        const __mmask16 real = mask_of(n - i);
        const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(real, x + i), factor);
        store_bf16(into + i, _mm512_mul_ps(v, _mm512_maskz_loadu_ps(real, weight + i)));
    }
}
