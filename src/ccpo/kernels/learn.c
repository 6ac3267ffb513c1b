/* What stands between the matrices of an update, and back: one pass over memory each. `ccpo.learner.fused` says what each is. */
#include "numbers.h"

/* sum = stream + branch (if there is one); scale = 1 / rms(sum); normed = weight * sum * scale */
void ccpo_add_norm(int M, int H, const float *stream, const bf16 *branch, const float *weight, float eps, float *sum, float *scale, bf16 *normed, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int i = 0; i < M; i++) {
        const long row = (long)i * H;
        for (int k = 0; k < H; k += 16) {
            const __mmask16 real = mask_of(H - k);
            __m512 x = _mm512_maskz_loadu_ps(real, stream + row + k);
            if (branch) x = _mm512_add_ps(x, load_bf16(real, branch + row + k));
            _mm512_mask_storeu_ps(sum + row + k, real, x);
        }
        scale[i] = inverse_rms(sum + row, H, eps);
        for (int k = 0; k < H; k += 16) {
            const __mmask16 real = mask_of(H - k);
            const __m512 unit = _mm512_mul_ps(_mm512_maskz_loadu_ps(real, sum + row + k), _mm512_set1_ps(scale[i]));
            keep_bf16(normed + row + k, real, _mm512_mul_ps(unit, _mm512_maskz_loadu_ps(real, weight + k)));
        }
    }
}

/* d_sum: the gradient of the stream; d_branch: the same in bfloat16; d_weight: [threads][H], zeros that are added to, for the caller to sum. The
 * last two may be NULL, as may d_stream, what else comes back to the sum. */
void ccpo_add_norm_back(int M, int H, const float *sum, const float *scale, const float *weight, const bf16 *d_normed, const float *d_stream, float *d_sum, bf16 *d_branch, float *d_weight, int threads) {
#pragma omp parallel num_threads(threads)
    {
        float *own = d_weight ? d_weight + (long)omp_get_thread_num() * H : NULL;
#pragma omp for schedule(static)
        for (int i = 0; i < M; i++) {
            const long row = (long)i * H;
            const __m512 factor = _mm512_set1_ps(scale[i]);
            __m512 along = _mm512_setzero_ps();
            for (int k = 0; k < H; k += 16) {
                const __mmask16 real = mask_of(H - k);
                const __m512 unit = _mm512_mul_ps(_mm512_maskz_loadu_ps(real, sum + row + k), factor);
                const __m512 both = _mm512_mul_ps(unit, load_bf16(real, d_normed + row + k));
                along = _mm512_fmadd_ps(both, _mm512_maskz_loadu_ps(real, weight + k), along);
                if (own) _mm512_mask_storeu_ps(own + k, real, _mm512_add_ps(_mm512_maskz_loadu_ps(real, own + k), both));
            }
            const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(along) / H);
            for (int k = 0; k < H; k += 16) {
                const __mmask16 real = mask_of(H - k);
                const __m512 unit = _mm512_mul_ps(_mm512_maskz_loadu_ps(real, sum + row + k), factor);
                __m512 d = _mm512_mul_ps(load_bf16(real, d_normed + row + k), _mm512_maskz_loadu_ps(real, weight + k));
                d = _mm512_mul_ps(_mm512_fnmadd_ps(unit, mean, d), factor);
                if (d_stream) d = _mm512_add_ps(d, _mm512_maskz_loadu_ps(real, d_stream + row + k));
                _mm512_mask_storeu_ps(d_sum + row + k, real, d);
                if (d_branch) keep_bf16(d_branch + row + k, real, d);
            }
        }
    }
}

static inline __m512 sigmoid(__m512 x) { return _mm512_div_ps(_mm512_set1_ps(1.0f), logistic(x)); }

/* out = silu(gate) * up, of rows [gate | up] of I channels each */
void ccpo_swiglu(int M, int I, const bf16 *gate_up, bf16 *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int i = 0; i < M; i++)
        for (int k = 0; k < I; k += 16) {
            const __mmask16 real = mask_of(I - k);
            const bf16 *from = gate_up + 2L * i * I + k;
            const __m512 gate = load_bf16(real, from), up = load_bf16(real, from + I);
            keep_bf16(out + (long)i * I + k, real, _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid(gate)), up));
        }
}

void ccpo_swiglu_back(int M, int I, const bf16 *gate_up, const bf16 *d_out, bf16 *d_gate_up, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int i = 0; i < M; i++)
        for (int k = 0; k < I; k += 16) {
            const __mmask16 real = mask_of(I - k);
            const bf16 *from = gate_up + 2L * i * I + k;
            bf16 *into = d_gate_up + 2L * i * I + k;
            const __m512 gate = load_bf16(real, from), up = load_bf16(real, from + I), d = load_bf16(real, d_out + (long)i * I + k);
            const __m512 one = _mm512_set1_ps(1.0f), s = sigmoid(gate), active = _mm512_mul_ps(gate, s);
            const __m512 slope = _mm512_fmadd_ps(active, _mm512_sub_ps(one, s), s); /* s + gate s (1 - s) */
            keep_bf16(into, real, _mm512_mul_ps(_mm512_mul_ps(d, up), slope));
            keep_bf16(into + I, real, _mm512_mul_ps(d, active));
        }
}

/* Of each row of logits, in float32: log softmax(logits * cold)[id], the entropy, and the logarithm of the sum of exponentials. `cold`: 1 /
 * temperature of each row, or NULL. */
void ccpo_logprobs(int N, int V, const bf16 *logits, const int64_t *id, const float *cold, float *logprob, float *entropy, float *total, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int i = 0; i < N; i++) {
        const bf16 *row = logits + (long)i * V;
        const float factor = cold ? cold[i] : 1;
        __m512 top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps(), mean = _mm512_setzero_ps();
        for (int v = 0; v < V; v += 16)
            top = _mm512_mask_max_ps(top, mask_of(V - v), load_bf16(mask_of(V - v), row + v), top);
        const float highest = _mm512_reduce_max_ps(top) * factor;
        for (int v = 0; v < V; v += 16) {
            const __mmask16 real = mask_of(V - v);
            const __m512 z = _mm512_fmsub_ps(load_bf16(real, row + v), _mm512_set1_ps(factor), _mm512_set1_ps(highest));
            const __m512 p = _mm512_maskz_mov_ps(real, exponential(z));
            sum = _mm512_add_ps(sum, p);
            /* where a weight is 0, its term is: a logit of -inf times 0 would be none */
            mean = _mm512_mask_add_ps(mean, _mm512_cmp_ps_mask(p, _mm512_setzero_ps(), _CMP_NEQ_UQ), mean, _mm512_mul_ps(p, z));
        }
        const float whole = _mm512_reduce_add_ps(sum), log_sum = logf(whole);
        logprob[i] = from_bf16(row[id[i]]) * factor - highest - log_sum;
        entropy[i] = log_sum - _mm512_reduce_add_ps(mean) / whole;
        total[i] = highest + log_sum;
    }
}

/* d_logits of the gradients of log-probs and entropies (either may be NULL): with p = softmax(z), d logp[id] / dz = onehot - p and d H / dz = -p (log p
 * + H), z = logits * cold */
void ccpo_logprobs_back(int N, int V, const bf16 *logits, const int64_t *id, const float *cold, const float *entropy, const float *total, const float *d_logprob, const float *d_entropy, bf16 *d_logits, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int i = 0; i < N; i++) {
        const bf16 *row = logits + (long)i * V;
        bf16 *into = d_logits + (long)i * V;
        const float factor = cold ? cold[i] : 1, of_logprob = d_logprob ? d_logprob[i] : 0, of_entropy = d_entropy ? d_entropy[i] : 0;
        const __m512 fixed = _mm512_set1_ps(-of_logprob - of_entropy * entropy[i]), slope = _mm512_set1_ps(-of_entropy);
        for (int v = 0; v < V; v += 16) {
            const __mmask16 real = mask_of(V - v);
            const __m512 z = _mm512_fmsub_ps(load_bf16(real, row + v), _mm512_set1_ps(factor), _mm512_set1_ps(total[i]));
            const __m512 p = exponential(z);
            const __m512 d = _mm512_mul_ps(p, of_entropy == 0 ? fixed : _mm512_fmadd_ps(slope, z, fixed));
            const __mmask16 some = _mm512_cmp_ps_mask(p, _mm512_setzero_ps(), _CMP_NEQ_UQ);
            keep_bf16(into + v, real, _mm512_mul_ps(_mm512_maskz_mov_ps(some, d), _mm512_set1_ps(factor)));
        }
        const float p = expf(from_bf16(row[id[i]]) * factor - total[i]), z = from_bf16(row[id[i]]) * factor - total[i];
        const float own = of_logprob * (1 - p) - (p == 0 ? 0 : of_entropy * p * (z + entropy[i]));
        store_row(into + id[i], &(float){own * factor}, 1);
    }
}
