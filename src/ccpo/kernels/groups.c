/* Advantages of groups that stand one after the other; `ccpo.credit.advantage` says what each formula is. */
#include "numbers.h"

/* N where the ids are N times one, then N times a larger one, and so on; -N where the next is another but not always a larger one; else 0. */
int64_t ccpo_group_length(int64_t B, const int64_t *id) {
    int64_t N = 1;
    while (N < B && id[N] == id[0]) N++;
    if (B == 0 || B % N) return 0;
    int ascending = 1;
    for (int64_t start = 0; start < B; start += N) {
        int64_t differing = 0;
        for (int64_t i = start + 1; i < start + N; i++) differing |= id[i] ^ id[start];
        if (differing || (start && id[start] == id[start - 1])) return 0;
        ascending &= !start || id[start] > id[start - 1];
    }
    return ascending ? N : -N;
}

enum { GRPO, DR_GRPO, RLOO, MAXRL };

static inline __attribute__((always_inline)) void advantages(int64_t G, int N, const float *credit, int formula, float *into) {
    const double others = N > 1 ? N - 1 : 1;
    for (int64_t g = 0; g < G; g++, credit += N, into += N) {
        const double first = credit[0];
        double sum = 0, squares = 0;
        /* from the first member, so that a group without spread is exactly 0 */
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < N; i++) sum += credit[i] - first;
        const double shift = sum / N, mean = first + shift;
        double factor = 1;
        if (formula == GRPO) {
#pragma omp simd reduction(+ : squares)
            for (int i = 0; i < N; i++) squares += (credit[i] - first - shift) * (credit[i] - first - shift);
            factor = 1 / (sqrt(squares / others) + 1e-6);
        } else if (formula == RLOO) {
            factor = N / others;
        } else if (formula == MAXRL) {
            factor = 1 / (mean > 1e-9 ? mean : mean == mean ? 1e-9 : mean);
        }
#pragma omp simd
        for (int i = 0; i < N; i++) into[i] = (float)((credit[i] - first - shift) * factor);
    }
}

/* credit and into: [G][N] */
void ccpo_advantages(int64_t G, int64_t N, const float *credit, int formula, float *into) {
#define SIZE(n) case n: advantages(G, n, credit, formula, into); break;
#define SIZES(n) SIZE(n) SIZE(2 * n) SIZE(4 * n) SIZE(8 * n)
    switch (N) {
        SIZES(2)
        SIZE(32)
        default: advantages(G, N, credit, formula, into);
    }
}
