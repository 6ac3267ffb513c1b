/* Tokens through a decoder-only transformer (Qwen2, Qwen3, Llama): `ccpo.engines.fused` calls this for whole prompts, and for steps.
 *
 * All threads walk through a layer together and wait for one another after each of its parts; `#pragma omp for` deals each part out. Keys and
 * values lie as the right side of a product does: keys a column a token, values a row a token.
 */
#include "numbers.h"

enum { QUERIES = 16, ROWS = 128, PAIRS = 8 };

typedef struct {
    const float *attention_norm;
    const bf16 *qkv;
    const float *qkv_bias, *qk_norm; /* either may be NULL; qk_norm: [heads + kv_heads][head_dim] */
    const bf16 *out;
    const float *out_bias, *mlp_norm;
    const bf16 *gate_up; /* a panel of gates, a panel of ups, and so on */
    const float *gate_up_bias;
    const bf16 *down;
    const float *down_bias;
} Layer;

typedef struct {
    int32_t layers, hidden, heads, kv_heads, head_dim, inner, vocab;
    float eps, scale;
    const bf16 *embed, *head;
    const float *norm, *rotation; /* rotation: [positions][head_dim / 2][2], cosine and sine */
    const Layer *layer;
} Model;

/* keys: [layers][slots][kv_heads][columns / 16][head_dim / 2][16][2]; values: [..][kv_heads][head_dim / 16][columns / 2][16][2] */
typedef struct {
    bf16 *keys, *values;
    int32_t slots, columns;
} Cache;

/* Token i goes into column column[i] + shift of slot[i] of `here`, and looks at the first `before[i]` columns of slot `from[i]` of `there`
 * and at `here` up to itself. Tokens [first[g], first[g + 1]) stand in one slot, one after the other. The logits of the
 * tokens `wanted` are made (of all in order, if it is NULL). */
typedef struct {
    int32_t tokens, shift, groups, wants;
    const int64_t *id;
    const int32_t *slot, *column, *from, *before, *first, *wanted;
} Batch;

/* ---- a layer's products, each with what follows it; called by all threads together ---- */

typedef void (*Ending)(void *into, long width, int row, int column, const float *sums, const float *bias);

static inline __m512 with_bias(const float *sums, const float *bias) {
    const __m512 x = _mm512_loadu_ps(sums);
    return bias ? _mm512_add_ps(x, _mm512_loadu_ps(bias)) : x;
}

static void ending_store(void *into, long width, int row, int column, const float *sums, const float *bias) {
    float *to = (float *)into + row * width + column;
    for (int half = 0; half < PAIR; half += PANEL)
        _mm512_storeu_ps(to + half, with_bias(sums + half, bias ? bias + half : NULL));
}

static void ending_add(void *into, long width, int row, int column, const float *sums, const float *bias) {
    float *to = (float *)into + row * width + column;
    for (int half = 0; half < PAIR; half += PANEL)
        _mm512_storeu_ps(to + half, _mm512_add_ps(_mm512_loadu_ps(to + half), with_bias(sums + half, bias ? bias + half : NULL)));
}

static void ending_gate(void *into, long width, int row, int column, const float *sums, const float *bias) {
    const __m512 gate = with_bias(sums, bias), up = with_bias(sums + PANEL, bias ? bias + PANEL : NULL);
    store_bf16((bf16 *)into + row * width + column / 2, _mm512_mul_ps(_mm512_div_ps(gate, logistic(gate)), up));
}

/* into <- ending(A B): M rows, N columns (a multiple of 32), K a multiple of 32. Each thread takes a run of blocks, of 128 rows and a pair of
 * panels each. Of many rows, 32 stay in the nearest cache while some pairs pass, and the pairs in the next one while the other rows do. */
static inline __attribute__((always_inline)) void multiply(
    int M, int N, int K, const bf16 *a, const bf16 *b, const float *bias, void *into, long width, Ending ending) {
    const int pairs = N / PAIR, tall = (M + ROWS - 1) / ROWS, most = M > 2 * PAIR ? PAIRS : 1;
    const long blocks = (long)tall * pairs, thread = omp_get_thread_num(), threads = omp_get_num_threads(), end = blocks * (thread + 1) / threads;
    for (long block = blocks * thread / threads; block < end;) {
        const int start = block / pairs * ROWS, from = block % pairs, count = smaller(smaller(pairs - from, most), end - block);
        for (int row = start; row < smaller(M, start + ROWS); row += PAIR)
            for (int column = from * PAIR; column < (from + count) * PAIR; column += PAIR) {
                float sums[PAIR * PAIR] __attribute__((aligned(64)));
                const int rows = smaller(smaller(M, start + ROWS) - row, PAIR);
                product(rows, 2, K, a + (long)row * K, K, b + (long)column * K, (long)PANEL * K, sums, PAIR, 0, 1);
                for (int i = 0; i < rows; i++) ending(into, width, row + i, column, sums + i * PAIR, bias ? bias + column : NULL);
            }
        block += count;
    }
#pragma omp barrier
}

/* C <- A B + bias, in float32: [M][N], of rows up to a multiple of 32. */
void ccpo_product(int M, int N, int K, const bf16 *a, const bf16 *b, const float *bias, float *c, int threads) {
#pragma omp parallel num_threads(threads)
    {
        begin_tiles();
        multiply(M, N, K, a, b, bias, c, N, ending_store);
        end_tiles();
    }
}

/* ---- attention ---- */

typedef struct {
    float *hidden, *qkv;
    bf16 *normed, *query, *mixed, *inner;
    char *own; /* of each thread */
    size_t own_bytes;
    int columns; /* of all a query can look at */
} Room;

static inline long slot_size(const Model *w, const Cache *c) { return (long)w->kv_heads * c->columns * w->head_dim; }

static inline long place(const Model *w, const Cache *c, int layer, int slot, int head) {
    return ((long)layer * c->slots + slot) * slot_size(w, c) + (long)head * c->columns * w->head_dim;
}

/* Normalises (if it should be) and rotates a query or a key in place. */
static void turn(const Model *w, float *x, const float *norm, const float *rotation) {
    const int n = w->head_dim;
    if (norm) {
        const float factor = inverse_rms(x, n, w->eps);
        for (int i = 0; i < n; i++) x[i] *= factor * norm[i];
    }
    for (int i = 0; i < n; i += 2) {
        const float real = x[i], imaginary = x[i + 1], cosine = rotation[i], sine = rotation[i + 1];
        x[i] = real * cosine - imaginary * sine;
        x[i + 1] = real * sine + imaginary * cosine;
    }
}

/* A token's queries, scaled, to `query`; its keys and values into the cache. */
static void place_token(const Model *w, const Layer *layer, int number, const Cache *here, const Batch *batch, int i, float *qkv, bf16 *query) {
    const int n = w->head_dim, column = batch->column[i] + batch->shift;
    const float *rotation = w->rotation + (long)(batch->before[i] + column) * n;
    for (int head = 0; head < w->heads + w->kv_heads; head++)
        turn(w, qkv + head * n, layer->qk_norm ? layer->qk_norm + head * n : NULL, rotation);
    for (int k = 0; k < w->heads * n; k += 16)
        store_bf16(query + k, _mm512_mul_ps(_mm512_loadu_ps(qkv + k), _mm512_set1_ps(w->scale)));
    for (int head = 0; head < w->kv_heads; head++) {
        const long start = place(w, here, number, batch->slot[i], head);
        const float *key = qkv + (w->heads + head) * n, *value = key + w->kv_heads * n;
        bf16 rounded[n];
        store_row(rounded, key, n);
        put_across(here->keys + start, rounded, column, n);
        store_row(rounded, value, n);
        put_down(here->values + start, rounded, column, n, here->columns);
    }
}

/* One part of what queries look at: so many columns of a slot's keys and values. */
typedef struct {
    const bf16 *keys, *values;
    int used, columns;
} Part;

/* M queries over their parts, the last of which query m sees up to `seen[m]` columns; the result, [M][head_dim], to `into`. */
static void attend(int M, int n, const bf16 *query, long lda, const Part *part, int parts, const int *seen, bf16 *into, long width, char *own, int room) {
    float *scores = (float *)own, *found = scores + (long)QUERIES * room;
    bf16 *weights = (bf16 *)(found + QUERIES * n);
    float share[QUERIES];
    const int tiles = M >= TILE / 2 && n % 32 == 0;
    int width_of[2], all = 0;
    for (int p = 0; p < parts; p++) {
        width_of[p] = up_to(part[p].used, 32);
        product(M, width_of[p] / PANEL, n, query, lda, part[p].keys, (long)PANEL * n, scores + all, room, 0, tiles);
        all += width_of[p];
    }
    for (int m = 0; m < M; m++) {
        float *row = scores + (long)m * room;
        for (int p = 0, start = 0; p < parts; start += width_of[p++])
            for (int k = p + 1 < parts ? part[p].used : seen[m]; k < width_of[p]; k++) row[start + k] = -INFINITY;
        __m512 top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
        for (int k = 0; k < all; k += 16) top = _mm512_max_ps(top, _mm512_loadu_ps(row + k));
        const __m512 highest = _mm512_set1_ps(_mm512_reduce_max_ps(top));
        for (int k = 0; k < all; k += 16) {
            const __m512 weight = exponential(_mm512_sub_ps(_mm512_loadu_ps(row + k), highest));
            sum = _mm512_add_ps(sum, weight);
            store_bf16(weights + (long)m * room + k, weight);
        }
        share[m] = 1.0f / _mm512_reduce_add_ps(sum);
    }
    all = 0;
    for (int p = 0; p < parts; all += width_of[p++])
        product(M, n / PANEL, width_of[p], weights + all, room, part[p].values, (long)part[p].columns * PANEL, found, n, p > 0, tiles);
    for (int m = 0; m < M; m++)
        for (int k = 0; k < n; k += 16)
            store_bf16(into + m * width + k, _mm512_mul_ps(_mm512_loadu_ps(found + m * n + k), _mm512_set1_ps(share[m])));
}

/* Tokens [first, first + count) of one slot, through the heads of one key head; the results to rows `to` and on of `mixed`. A single token's
 * heads are multiplied together, the same head of several tokens else. */
static void attend_group(const Model *w, int number, const Cache *there, const Cache *here, const Batch *batch, int first, int count, int head, const Room *room, int to) {
    const int n = w->head_dim, share = w->heads / w->kv_heads, column = batch->column[first] + batch->shift, before = batch->before[first];
    const long wide = (long)w->heads * n, width = up_to(wide, 32);
    char *own = room->own + omp_get_thread_num() * room->own_bytes;
    Part part[2], *next = part;
    if (before) {
        const long start = place(w, there, number, batch->from[first], head);
        *next++ = (Part){there->keys + start, there->values + start, before, there->columns};
    }
    const long start = place(w, here, number, batch->slot[first], head);
    *next++ = (Part){here->keys + start, here->values + start, column + count, here->columns};
    int seen[QUERIES];
    for (int m = 0; m < QUERIES; m++) seen[m] = column + 1 + (count > 1 ? m : 0);
    const bf16 *query = room->query + first * wide + (long)head * share * n;
    bf16 *into = room->mixed + to * width + (long)head * share * n;
    if (count == 1)
        for (int m = 0; m < share; m += QUERIES)
            attend(smaller(share - m, QUERIES), n, query + m * n, n, part, next - part, seen, into + m * n, n, own, room->columns);
    else
        for (int m = 0; m < share; m++) attend(count, n, query + m * n, wide, part, next - part, seen, into + m * n, width, own, room->columns);
}

/* ---- the whole model ---- */

/* Lays the room for so many tokens and columns out from `base`; how many bytes it takes. */
static size_t lay_out(const Model *w, int tokens, int columns, int threads, char *base, Room *room) {
    const long rows = up_to(tokens, PAIR) + PAIR, wide = (long)w->heads * w->head_dim, every = wide + 2L * w->kv_heads * w->head_dim;
    size_t used = 0;
    room->columns = columns;
    room->hidden = carve(base, &used, rows * up_to(w->hidden, 32) * 4);
    room->qkv = carve(base, &used, rows * up_to(every, 32) * 4);
    room->normed = carve(base, &used, rows * up_to(w->hidden, 32) * 2);
    room->query = carve(base, &used, rows * wide * 2);
    room->mixed = carve(base, &used, rows * up_to(wide, 32) * 2);
    room->inner = carve(base, &used, rows * up_to(w->inner, 32) * 2);
    room->own_bytes = (size_t)up_to(QUERIES * (columns * 6 + w->head_dim * 4), 64);
    room->own = carve(base, &used, room->own_bytes * threads);
    return used;
}

size_t ccpo_room(const Model *w, int tokens, int columns, int threads) {
    Room room;
    return lay_out(w, tokens, columns, threads, NULL, &room);
}

/* Runs the tokens; logits: [wants][vocab up to a multiple of 32]. `columns`: at most so many can a token look at (each part's up to a
 * multiple of 32); `base`: `ccpo_room` bytes. */
void ccpo_forward(const Model *w, const Cache *there, const Cache *here, const Batch *batch, float *logits, int columns, int threads, char *base) {
    Room room;
    lay_out(w, batch->tokens, columns, threads, base, &room);
    const int wide = up_to(w->hidden, 32), heads = up_to(w->heads * w->head_dim, 32), inner = up_to(w->inner, 32), vocab = up_to(w->vocab, 32);
    const int every = up_to((w->heads + 2 * w->kv_heads) * w->head_dim, 32);
#pragma omp parallel num_threads(threads)
    {
        int tokens = batch->tokens;
        begin_tiles();
#pragma omp for schedule(static)
        for (int i = 0; i < tokens; i++)
            read_row(room.hidden + (long)i * wide, w->embed + batch->id[i] * w->hidden, w->hidden, wide);
        for (int number = 0; number < w->layers; number++) {
            const Layer *layer = w->layer + number;
            const int last = number + 1 == w->layers && batch->wanted;
#pragma omp for schedule(static)
            for (int i = 0; i < tokens; i++)
                norm_row(room.normed + (long)i * wide, room.hidden + (long)i * wide, layer->attention_norm, w->hidden, wide, w->eps);
            multiply(tokens, every, wide, room.normed, layer->qkv, layer->qkv_bias, room.qkv, every, ending_store);
#pragma omp for schedule(static)
            for (int i = 0; i < tokens; i++)
                place_token(w, layer, number, here, batch, i, room.qkv + (long)i * every, room.query + (long)i * w->heads * w->head_dim);
            const int groups = last ? batch->wants : batch->groups;
#pragma omp for schedule(dynamic, 4)
            for (int task = 0; task < groups * w->kv_heads; task++) {
                const int g = task / w->kv_heads, first = last ? batch->wanted[g] : batch->first[g];
                attend_group(w, number, there, here, batch, first, last ? 1 : batch->first[g + 1] - first, task % w->kv_heads, &room, last ? g : first);
            }
            if (last) { /* only what is wanted goes on; `wanted` ascends, so that nothing is overwritten before it has moved */
                tokens = batch->wants;
#pragma omp single
                for (int i = 0; i < tokens; i++)
                    if (batch->wanted[i] != i) memcpy(room.hidden + (long)i * wide, room.hidden + (long)batch->wanted[i] * wide, wide * 4);
            }
            multiply(tokens, wide, heads, room.mixed, layer->out, layer->out_bias, room.hidden, wide, ending_add);
#pragma omp for schedule(static)
            for (int i = 0; i < tokens; i++)
                norm_row(room.normed + (long)i * wide, room.hidden + (long)i * wide, layer->mlp_norm, w->hidden, wide, w->eps);
            multiply(tokens, 2 * inner, wide, room.normed, layer->gate_up, layer->gate_up_bias, room.inner, inner, ending_gate);
            multiply(tokens, wide, inner, room.inner, layer->down, layer->down_bias, room.hidden, wide, ending_add);
        }
#pragma omp for schedule(static)
        for (int i = 0; i < tokens; i++)
            norm_row(room.normed + (long)i * wide, room.hidden + (long)i * wide, w->norm, w->hidden, wide, w->eps);
        multiply(tokens, vocab, wide, room.normed, w->head, NULL, logits, vocab, ending_store);
        end_tiles();
    }
}
