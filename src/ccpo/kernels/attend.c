/* Attention of the update, and back: prompts, each by itself, and texts, each over its prompt and itself (`ccpo.learner.layout`).
 *
 * One thread takes a prompt with all its texts and one key head, so that whatever the texts add to the gradient of their prompt needs no lock.
 * Keys and values lie as right sides of products: a token a column ("across"), and a token a row ("down"), as each product wants
 * them. Queries go through in blocks of 64 of one head, whose scores stay in the cache; the way back computes them again from `total`, the
 * logarithm of each query's sum.
 */
#include "numbers.h"

enum { BLOCK = 64 };

/* Tokens [start[s], start[s] + size[s]); segments 0 to prompts - 1 are the prompts, and texts[t] of first_text[p] <= t < first_text[p + 1] are
 * the segments of prompt p's texts. rotation: [tokens][head_dim / 2][2]. */
typedef struct {
    int32_t tokens, prompts, heads, kv_heads, head_dim;
    float scale;
    const int32_t *start, *size, *first_text, *texts;
    const float *rotation;
} Texts;

typedef struct {
    bf16 *keys_across, *keys_down, *values_across, *values_down, *queries_down, *grads_down;
    bf16 *query, *grad, *weights, *slopes, *turned; /* [BLOCK][head_dim], twice; [BLOCK][columns], twice; [columns][BLOCK] */
    float *scores, *more, *found, *d_keys, *d_values;
    int columns;
} Desk;

static size_t lay_desk(int n, int longest, char *base, Desk *desk) {
    const size_t columns = up_to(longest, 32) + 32, side = columns * n, block = (size_t)BLOCK * n, area = BLOCK * columns;
    size_t used = 0;
    desk->keys_across = carve(base, &used, side * 2);
    desk->keys_down = carve(base, &used, side * 2);
    desk->values_across = carve(base, &used, side * 2);
    desk->values_down = carve(base, &used, side * 2);
    desk->queries_down = carve(base, &used, block * 2);
    desk->grads_down = carve(base, &used, block * 2);
    desk->query = carve(base, &used, block * 2);
    desk->grad = carve(base, &used, block * 2);
    desk->weights = carve(base, &used, area * 2);
    desk->slopes = carve(base, &used, area * 2);
    desk->turned = carve(base, &used, area * 2);
    desk->scores = carve(base, &used, area * 4);
    desk->more = carve(base, &used, area * 4);
    desk->found = carve(base, &used, block * 4);
    desk->d_keys = carve(base, &used, side * 4);
    desk->d_values = carve(base, &used, side * 4);
    desk->columns = columns;
    return used;
}

static int longest(const Texts *t) {
    int most = 0;
    for (int p = 0; p < t->prompts; p++) {
        int text = 0;
        for (int i = t->first_text[p]; i < t->first_text[p + 1]; i++)
            if (t->size[t->texts[i]] > text) text = t->size[t->texts[i]];
        if (t->size[p] + text > most) most = t->size[p] + text;
    }
    return most;
}

size_t ccpo_attend_room(const Texts *t, int threads) {
    Desk desk;
    return lay_desk(t->head_dim, longest(t), NULL, &desk) * threads;
}

/* x -> scale * (x turned by angle, or back), of a head whose halves are real and imaginary parts */
static void rotate(const bf16 *x, const float *turn, float *into, int n, float scale) {
    for (int k = 0; k < n / 2; k++) {
        const float real = from_bf16(x[k]), imaginary = from_bf16(x[k + n / 2]), cosine = turn[2 * k], sine = turn[2 * k + 1];
        into[k] = scale * (real * cosine - imaginary * sine);
        into[k + n / 2] = scale * (real * sine + imaginary * cosine);
    }
}

static void rotate_back(const float *x, const float *turn, bf16 *into, int n, float scale) {
    float out[n];
    for (int k = 0; k < n / 2; k++) {
        const float real = x[k], imaginary = x[k + n / 2], cosine = turn[2 * k], sine = turn[2 * k + 1];
        out[k] = scale * (real * cosine + imaginary * sine);
        out[k + n / 2] = scale * (imaginary * cosine - real * sine);
    }
    store_row(into, out, n);
}

/* The keys and values of a segment into columns from `column` on; `back`: all that the way back needs. */
static void put_segment(const Texts *t, const bf16 *qkv, int segment, int head, int column, Desk *desk, int back) {
    const int n = t->head_dim, every = (t->heads + 2 * t->kv_heads) * n;
    for (int i = 0; i < t->size[segment]; i++, column++) {
        const int token = t->start[segment] + i;
        const bf16 *key = qkv + (long)token * every + (t->heads + head) * n, *value = key + t->kv_heads * n;
        float turned[n];
        bf16 short_key[n];
        rotate(key, t->rotation + (long)token * n, turned, n, 1);
        store_row(short_key, turned, n);
        put_across(desk->keys_across, short_key, column, n);
        put_down(desk->values_down, value, column, n, desk->columns);
        if (back) {
            put_down(desk->keys_down, short_key, column, n, desk->columns);
            put_across(desk->values_across, value, column, n);
        }
    }
}

/* Zeros where columns stay unused up to a multiple of 32: they are multiplied with weights of 0, and must be numbers. */
static void clear_columns(Desk *desk, int column, int n, int back) {
    static const bf16 zeros[1024];
    for (const int end = up_to(column, 32); column < end; column++) {
        put_across(desk->keys_across, zeros, column, n);
        put_down(desk->values_down, zeros, column, n, desk->columns);
        if (back) {
            put_down(desk->keys_down, zeros, column, n, desk->columns);
            put_across(desk->values_across, zeros, column, n);
        }
    }
}

/* The scaled, rotated queries of a block into `query`, and its scores over `columns` columns (a multiple of 32). */
static void score_block(const Texts *t, const bf16 *qkv, int token, int count, int head, int columns, Desk *desk) {
    const int n = t->head_dim, every = (t->heads + 2 * t->kv_heads) * n;
    for (int i = 0; i < count; i++) {
        float turned[n];
        rotate(qkv + (long)(token + i) * every + head * n, t->rotation + (long)(token + i) * n, turned, n, t->scale);
        store_row(desk->query + i * n, turned, n);
    }
    product(count, columns / PANEL, n, desk->query, n, desk->keys_across, (long)PANEL * n, desk->scores, desk->columns, 0, n % 32 == 0);
}

/* Weights exp(score - against) of the first `seen` columns, 0 beyond, in `scores` and rounded in `weights`; their sum. */
static float weigh(float *scores, bf16 *weights, int seen, int columns, float against) {
    __m512 sum = _mm512_setzero_ps();
    for (int k = 0; k < columns; k += 16) {
        const __mmask16 real = mask_of(seen - k);
        const __m512 y = _mm512_maskz_mov_ps(real, exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + k), _mm512_set1_ps(against))));
        _mm512_storeu_ps(scores + k, y);
        store_bf16(weights + k, y);
        sum = _mm512_add_ps(sum, y);
    }
    return _mm512_reduce_add_ps(sum);
}

static float largest(const float *x, int n) {
    float top = -INFINITY;
    for (int k = 0; k < n; k++) top = x[k] > top ? x[k] : top;
    return top;
}

static void forward_block(const Texts *t, const bf16 *qkv, int token, int count, int head, int before, bf16 *mixed, float *total, Desk *desk) {
    const int n = t->head_dim, columns = up_to(before + count, 32);
    score_block(t, qkv, token, count, head, columns, desk);
    float share[BLOCK];
    for (int i = 0; i < count; i++) {
        float *scores = desk->scores + (long)i * desk->columns, top = largest(scores, before + i + 1);
        const float sum = weigh(scores, desk->weights + (long)i * desk->columns, before + i + 1, columns, top);
        share[i] = 1 / sum;
        total[(long)(token + i) * t->heads + head] = top + logf(sum);
    }
    product(count, n / PANEL, columns, desk->weights, desk->columns, desk->values_down, (long)desk->columns * PANEL, desk->found, n, 0, 1);
    for (int i = 0; i < count; i++) {
        for (int k = 0; k < n; k++) desk->found[i * n + k] *= share[i];
        store_row(mixed + ((long)(token + i) * t->heads + head) * n, desk->found + i * n, n);
    }
}

/* [count][columns] turned into [columns][BLOCK], zeros beyond count */
static void turn_over(const bf16 *x, int count, int columns, long width, bf16 *into) {
    for (int c = 0; c < columns; c++)
        for (int i = 0; i < BLOCK; i++) into[c * BLOCK + i] = i < count ? x[i * width + c] : 0;
}

static void backward_block(const Texts *t, const bf16 *qkv, int token, int count, int head, int before, const bf16 *d_mixed, const float *total, bf16 *d_qkv, Desk *desk) {
    const int n = t->head_dim, every = (t->heads + 2 * t->kv_heads) * n, columns = up_to(before + count, 32), tiles = n % 32 == 0;
    const int deep = up_to(count, 32), panel = desk->columns * PANEL;
    score_block(t, qkv, token, count, head, columns, desk);
    memset(desk->queries_down, 0, BLOCK * n * 2);
    memset(desk->grads_down, 0, BLOCK * n * 2);
    for (int i = 0; i < count; i++) {
        const bf16 *grad = d_mixed + ((long)(token + i) * t->heads + head) * n;
        memcpy(desk->grad + i * n, grad, n * 2);
        put_down(desk->grads_down, grad, i, n, BLOCK);
        put_down(desk->queries_down, desk->query + i * n, i, n, BLOCK);
    }
    product(count, columns / PANEL, n, desk->grad, n, desk->values_across, (long)PANEL * n, desk->more, desk->columns, 0, tiles);
    for (int i = 0; i < count; i++) {
        float *weights = desk->scores + (long)i * desk->columns, *slopes = desk->more + (long)i * desk->columns;
        weigh(weights, desk->weights + (long)i * desk->columns, before + i + 1, columns, total[(long)(token + i) * t->heads + head]);
        __m512 sum = _mm512_setzero_ps();
        for (int k = 0; k < columns; k += 16) sum = _mm512_fmadd_ps(_mm512_loadu_ps(weights + k), _mm512_loadu_ps(slopes + k), sum);
        const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum));
        for (int k = 0; k < columns; k += 16)
            store_bf16(desk->slopes + (long)i * desk->columns + k,
                       _mm512_mul_ps(_mm512_loadu_ps(weights + k), _mm512_sub_ps(_mm512_loadu_ps(slopes + k), mean)));
    }
    product(count, n / PANEL, columns, desk->slopes, desk->columns, desk->keys_down, panel, desk->found, n, 0, 1);
    for (int i = 0; i < count; i++)
        rotate_back(desk->found + i * n, t->rotation + (long)(token + i) * n, d_qkv + (long)(token + i) * every + head * n, n, t->scale);
    turn_over(desk->slopes, count, columns, desk->columns, desk->turned);
    product(columns, n / PANEL, deep, desk->turned, BLOCK, desk->queries_down, BLOCK * PANEL, desk->d_keys, n, 1, 1);
    turn_over(desk->weights, count, columns, desk->columns, desk->turned);
    product(columns, n / PANEL, deep, desk->turned, BLOCK, desk->grads_down, BLOCK * PANEL, desk->d_values, n, 1, 1);
}

/* The gradients of a segment's keys and values, which lie from `column` on, to `d_qkv`. */
static void give_back(const Texts *t, int segment, int head, int column, bf16 *d_qkv, const Desk *desk) {
    const int n = t->head_dim, every = (t->heads + 2 * t->kv_heads) * n;
    for (int i = 0; i < t->size[segment]; i++, column++) {
        const int token = t->start[segment] + i;
        bf16 *key = d_qkv + (long)token * every + (t->heads + head) * n;
        rotate_back(desk->d_keys + (long)column * n, t->rotation + (long)token * n, key, n, 1);
        store_row(key + t->kv_heads * n, desk->d_values + (long)column * n, n);
    }
}

/* A segment's queries, of all heads of a key head, over `before` columns of its prompt and its own. */
static void run_segment(const Texts *t, const bf16 *qkv, int segment, int head, int before, bf16 *mixed, float *total, const bf16 *d_mixed, bf16 *d_qkv, Desk *desk) {
    const int share = t->heads / t->kv_heads, back = d_mixed != NULL;
    put_segment(t, qkv, segment, head, before, desk, back);
    clear_columns(desk, before + t->size[segment], t->head_dim, back);
    for (int h = head * share; h < (head + 1) * share; h++)
        for (int i = 0; i < t->size[segment]; i += BLOCK) {
            const int count = smaller(BLOCK, t->size[segment] - i), token = t->start[segment] + i;
            if (back)
                backward_block(t, qkv, token, count, h, before + i, d_mixed, total, d_qkv, desk);
            else
                forward_block(t, qkv, token, count, h, before + i, mixed, total, desk);
        }
}

static void run_all(const Texts *t, const bf16 *qkv, bf16 *mixed, float *total, const bf16 *d_mixed, bf16 *d_qkv, char *base, int threads) {
    const int most = longest(t), n = t->head_dim;
#pragma omp parallel num_threads(threads)
    {
        Desk desk;
        lay_desk(n, most, base + lay_desk(n, most, NULL, &desk) * omp_get_thread_num(), &desk);
        begin_tiles();
#pragma omp for schedule(dynamic, 1)
        for (int task = 0; task < t->prompts * t->kv_heads; task++) {
            const int prompt = task / t->kv_heads, head = task % t->kv_heads, before = t->size[prompt];
            if (d_mixed) memset(desk.d_keys, 0, (size_t)desk.columns * n * 4), memset(desk.d_values, 0, (size_t)desk.columns * n * 4);
            run_segment(t, qkv, prompt, head, 0, mixed, total, d_mixed, d_qkv, &desk);
            for (int i = t->first_text[prompt]; i < t->first_text[prompt + 1]; i++) {
                const int text = t->texts[i];
                const size_t own = (size_t)(desk.columns - before) * n * 4;
                if (d_mixed) memset(desk.d_keys + (long)before * n, 0, own), memset(desk.d_values + (long)before * n, 0, own);
                run_segment(t, qkv, text, head, before, mixed, total, d_mixed, d_qkv, &desk);
                if (d_mixed) give_back(t, text, head, before, d_qkv, &desk);
            }
            if (d_mixed) give_back(t, prompt, head, 0, d_qkv, &desk);
        }
        end_tiles();
    }
}

/* qkv: [tokens][heads + 2 kv_heads][head_dim] -> mixed: [tokens][heads][head_dim], total: [tokens][heads]; base: ccpo_attend_room bytes */
void ccpo_attend(const Texts *t, const bf16 *qkv, bf16 *mixed, float *total, char *base, int threads) {
    run_all(t, qkv, mixed, total, NULL, NULL, base, threads);
}

/* The gradient of qkv from that of mixed. */
void ccpo_attend_back(const Texts *t, const bf16 *qkv, const float *total, const bf16 *d_mixed, bf16 *d_qkv, char *base, int threads) {
    run_all(t, qkv, NULL, (float *)total, d_mixed, d_qkv, base, threads);
}
