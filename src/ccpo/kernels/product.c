/* Products of bfloat16 matrices, with AMX or with AVX-512. */
#include "numbers.h"

#include <sys/syscall.h>
#include <unistd.h>

static int use_tiles = 0; /* whether there is an AMX, and it may be used */

static inline __attribute__((always_inline)) void vector_block(
    int M, int P, int K, const bf16 *a, long lda, const bf16 *b, long panel, float *c, long ldc, int add) {
    __m512 sum[4][4];
    for (int m = 0; m < M; m++)
        for (int p = 0; p < P; p++) sum[m][p] = add ? _mm512_loadu_ps(c + m * ldc + p * PANEL) : _mm512_setzero_ps();
    for (int k = 0; k < K; k += 2) {
        __m512bh right[4];
        for (int p = 0; p < P; p++) right[p] = (__m512bh)_mm512_loadu_si512(b + p * panel + k * PANEL);
        for (int m = 0; m < M; m++) {
            int32_t pair;
            memcpy(&pair, a + m * lda + k, 4);
            const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
            for (int p = 0; p < P; p++) sum[m][p] = _mm512_dpbf16_ps(sum[m][p], left, right[p]);
        }
    }
    for (int m = 0; m < M; m++)
        for (int p = 0; p < P; p++) _mm512_storeu_ps(c + m * ldc + p * PANEL, sum[m][p]);
}

static void vector_product(int M, int P, int K, const bf16 *a, long lda, const bf16 *b, long panel, float *c, long ldc, int add) {
    for (int m = 0; m < M; m += 4)
        for (int p = 0; p < P; p += 4) {
            const bf16 *left = a + m * lda, *right = b + p * panel;
            float *into = c + m * ldc + p * PANEL;
#define BLOCK(rows, panels) \
    case rows * 8 + panels: \
        vector_block(rows, panels, K, left, lda, right, panel, into, ldc, add); \
        break;
#define BLOCKS(rows) BLOCK(rows, 1) BLOCK(rows, 2) BLOCK(rows, 3) BLOCK(rows, 4)
            switch (smaller(M - m, 4) * 8 + smaller(P - p, 4)) { BLOCKS(1) BLOCKS(2) BLOCKS(3) BLOCKS(4) }
        }
}

#ifdef __AMX_BF16__
enum { TILE_DATA = 18, REQUEST_PERMISSION = 0x1023 }; /* of arch_prctl */

/* Not on the stack: some compilers believe that only the first 8 bytes are read, and leave the others unwritten. */
static const struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} SHAPE = {.palette = 1, .bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE}};

void begin_tiles(void) {
    if (use_tiles) _tile_loadconfig(&SHAPE);
}
void end_tiles(void) {
    if (use_tiles) _tile_release();
}

static void tile_product(int M, int P, int K, const bf16 *a, long lda, const bf16 *b, long panel, float *c, long ldc, int add) {
    for (int m = 0; m < M; m += 2 * TILE)
        for (int p = 0; p < P; p += 2) {
            const int tall = M - m > TILE, wide = P - p > 1;
            const bf16 *top = a + m * lda, *low = top + TILE * lda, *left = b + p * panel, *right = left + panel;
            float *into = c + m * ldc + p * PANEL;
            if (add) {
                _tile_loadd(0, into, ldc * 4);
                if (wide) _tile_loadd(1, into + PANEL, ldc * 4);
                if (tall) _tile_loadd(2, into + TILE * ldc, ldc * 4);
                if (tall && wide) _tile_loadd(3, into + TILE * ldc + PANEL, ldc * 4);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (int k = 0; k < K; k += 32) {
                _tile_loadd(4, top + k, lda * 2);
                _tile_loadd(6, left + k * PANEL, 64);
                _tile_dpbf16ps(0, 4, 6);
                if (wide) {
                    _tile_loadd(7, right + k * PANEL, 64);
                    _tile_dpbf16ps(1, 4, 7);
                }
                if (tall) {
                    _tile_loadd(5, low + k, lda * 2);
                    _tile_dpbf16ps(2, 5, 6);
                    if (wide) _tile_dpbf16ps(3, 5, 7);
                }
            }
            _tile_stored(0, into, ldc * 4);
            if (wide) _tile_stored(1, into + PANEL, ldc * 4);
            if (tall) _tile_stored(2, into + TILE * ldc, ldc * 4);
            if (tall && wide) _tile_stored(3, into + TILE * ldc + PANEL, ldc * 4);
        }
}
#else
void begin_tiles(void) {}
void end_tiles(void) {}
static void tile_product(int M, int P, int K, const bf16 *a, long lda, const bf16 *b, long panel, float *c, long ldc, int add) {
    vector_product(M, P, K, a, lda, b, panel, c, ldc, add);
}
#endif

/* Call once, before anything else: whether AMX is used. Not used if `allowed` is 0. */
int ccpo_begin(int allowed) {
    (void)allowed;
#ifdef __AMX_BF16__
    use_tiles = allowed && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#endif
    return use_tiles;
}

void product(int M, int P, int K, const bf16 *a, long lda, const bf16 *b, long panel, float *c, long ldc, int add, int tiles) {
    (use_tiles && tiles ? tile_product : vector_product)(M, P, K, a, lda, b, panel, c, ldc, add);
}
