/* Draws tokens from logits; `ccpo.engines.sampling` says how, and makes the noise. */
#include "numbers.h"

enum { BLOCKS = 1024 };

/* exp((logits[v] - top) / temperature) of 16 tokens; 0 beyond the last */
static inline __m512 weights_at(const float *logits, int v, int vocab, float top, __m512 cold) {
    const __mmask16 real = mask_of(vocab - v);
    const __m512 x = _mm512_sub_ps(_mm512_maskz_loadu_ps(real, logits + v), _mm512_set1_ps(top));
    return _mm512_maskz_mov_ps(real, exponential(_mm512_mul_ps(x, cold)));
}

/* The first token whose cumulative weight exceeds u times the total, and its probability under softmax(logits / temperature); the most
 * probable one, if `greedy`. A row with a NaN: the last token, with a NaN. */
static void sample_row(int vocab, const float *logits, double u, float temperature, int greedy, int64_t *token, float *probability) {
    const int size = up_to((vocab + BLOCKS - 1) / BLOCKS, 16), blocks = (vocab + size - 1) / size;
    const __m512 cold = _mm512_set1_ps(1.0f / temperature);
    float top = -INFINITY, weight[16];
    double mass[BLOCKS], total = 0;
    int best = 0, block = 0, last = 0;
    for (int v = 0; v < vocab; v++)
        if (logits[v] > top) top = logits[v], best = v;
    for (int b = 0; b < blocks; b++) {
        __m512d sum = _mm512_setzero_pd();
        for (int v = b * size; v < smaller(vocab, (b + 1) * size); v += 16) {
            const __m512 y = weights_at(logits, v, vocab, top, cold);
            sum = _mm512_add_pd(sum, _mm512_cvtps_pd(_mm512_castps512_ps256(y)));
            sum = _mm512_add_pd(sum, _mm512_cvtps_pd(_mm512_extractf32x8_ps(y, 1)));
        }
        total += mass[b] = _mm512_reduce_add_pd(sum);
        if (mass[b] > 0) last = b;
    }
    *token = vocab - 1;
    *probability = NAN;
    if (total != total) return;
    if (greedy) {
        *token = best;
        *probability = (float)(1 / total); /* the weight of the most probable token is 1 */
        return;
    }
    double rest = u * total;
    while (block < last && mass[block] <= rest) rest -= mass[block++];
    for (int v = block * size; v < smaller(vocab, (block + 1) * size); v += 16) {
        _mm512_storeu_ps(weight, weights_at(logits, v, vocab, top, cold));
        for (int k = 0; k < 16; k++) {
            if (weight[k] > 0) *token = v + k, *probability = (float)(weight[k] / total); /* the last one, if rounding leaves a rest */
            if (weight[k] > rest) return;
            rest -= weight[k];
        }
    }
}

void ccpo_sample(int rows, int vocab, const float *logits, long width, const double *noise, long noise_width, const float *temperature, const uint8_t *greedy, int64_t *token, float *probability, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int i = 0; i < rows; i++)
        sample_row(vocab, logits + i * width, noise[i * noise_width], temperature ? temperature[i] : 1.0f, greedy && greedy[i], token + i, probability + i);
}
