#include "checks.h"

#include <stdio.h>
#include <stdlib.h>

void require(int ok, const char *what) {
    if (ok) return;
    fprintf(stderr, "checks: %s: %s\n", what, bn_last_error());
    exit(1);
}

static void *held[512];
int n_held;

void *room(int64_t n, size_t item, int skew) {
    require(n_held < (int)(sizeof held / sizeof *held), "more buffers than expected");
    char *p = malloc((size_t)(n + skew) * item);
    require(p != NULL, "out of memory");
    held[n_held++] = p;
    return p + (size_t)skew * item;
}

void release(int keep) {
    while (n_held > keep) free(held[--n_held]);
}

static uint64_t state = 0x9e3779b97f4a7c15u;

uint32_t random_bits(void) { /* xorshift64* */
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (uint32_t)((state * 0x2545f4914f6cdd1du) >> 32);
}

int between(int low, int high) { return low + (int)(random_bits() % (uint32_t)(high - low + 1)); }

float *random_floats(int64_t n, float centre, float spread) {
    float *x = room(n, sizeof *x, between(0, 3));
    for (int64_t i = 0; i < n; i++) x[i] = centre + spread * ((float)random_bits() / 2147483648.0f - 1.0f);
    return x;
}

uint16_t *random_halves(int64_t n) {
    uint16_t *x = room(n, sizeof *x, between(0, 7));
    for (int64_t i = 0; i < n; i++) /* either sign, 2^-6 to 2 */
        x[i] = (uint16_t)((random_bits() & 0x83ffu) | (uint32_t)between(9, 15) << 10);
    return x;
}

uint8_t *random_codes(int64_t n_bytes) {
    uint8_t *w = room(n_bytes, 1, between(0, 15));
    for (int64_t i = 0; i < n_bytes; i++)
        w[i] = (uint8_t)(between(0, 2) << 6 | between(0, 2) << 4 | between(0, 2) << 2 | between(0, 2));
    return w;
}
