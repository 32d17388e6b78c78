/* Dots of several binary16 rows with several columns, for any vector width. Included after
 * kernels_avx2.h by a kernel file that has defined, for its width: vector, LANES, vector_zero(),
 * vector_load(p), vector_load_half(p), vector_fma(a, b, c) and vector_join(sums, n_sums), which
 * adds the sums of one output down to 8 lanes in the reference's order.
 *
 * A dot is `n_sums` vectors of sums, vector s over the elements LANES * s + [0, LANES) of every
 * LANES * n_sums: the reference's accumulators (4 of W lanes in the binary16 dot, 1 in the tiled
 * dot, W = 8 or 16).
 *
 * A tile is several rows of `a` times several columns of `b`, so that each value of `a` is
 * converted once for all columns and the latency of the FMA is hidden; at most `at_once` sums of
 * every output are in registers together. They alternate over a stretch of the rows that stays
 * in the first-level cache. */
enum { STRETCH = 1024, SUMS_IN_REGISTERS = 8, MOST_SUMS = 8, MOST_ROWS = 4, MOST_COLS = 4 };

/* Elements of a cache line, and of the prefetch distance in rows, at least two rows: the rows of
 * a KV cache are too far apart for the hardware prefetcher. */
enum { LINE = 32, AHEAD = 4096 };

typedef struct {
    const uint16_t *a;
    int64_t lda;
    const float *b;
    int64_t ldb;
    int64_t n;
    float *out;
    int64_t ldo;
    int64_t ahead; /* rows between those computed and those prefetched */
} dots_args;

/* Adds elements [begin, end) to the sums; the first stretch starts them. */
static inline __attribute__((always_inline)) void add_stretch(const dots_args *d, const uint16_t *a, int rows,
                                                              const float *b, int cols, int n_sums, int at_once,
                                                              int64_t begin, int64_t end,
                                                              vector sums[MOST_ROWS][MOST_COLS][MOST_SUMS]) {
    const int is_stream = rows * cols == 1;
    const int asks_ahead = !is_stream && LANES * n_sums >= LINE; /* a tiled product's rows are in the caches */
    for (int s0 = 0; s0 < n_sums; s0 += at_once) {
        vector acc[MOST_ROWS][MOST_COLS][MOST_SUMS];
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < cols; c++)
                for (int s = 0; s < at_once; s++) acc[r][c][s] = begin ? sums[r][c][s0 + s] : vector_zero();
        for (int64_t i = begin + LANES * s0; i < end; i += LANES * n_sums) {
            for (int s = 0; s < at_once; s++) {
                if (is_stream && LANES * s % LINE == 0)
                    _mm_prefetch((const char *)(a + i + LANES * s) + BN_PREFETCH_HALF, _MM_HINT_T0);
                for (int r = 0; asks_ahead && s0 + s == 0 && r < rows; r++)
                    for (int l = 0; l < LANES * n_sums; l += LINE)
                        _mm_prefetch((const char *)(a + (d->ahead + r) * d->lda + i + l), _MM_HINT_T0);
                vector v[MOST_ROWS];
                for (int r = 0; r < rows; r++) v[r] = vector_load_half(a + r * d->lda + i + LANES * s);
                for (int c = 0; c < cols; c++) {
                    const vector x = vector_load(b + c * d->ldb + i + LANES * s);
                    for (int r = 0; r < rows; r++) acc[r][c][s] = vector_fma(v[r], x, acc[r][c][s]);
                }
            }
        }
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < cols; c++)
                for (int s = 0; s < at_once; s++) sums[r][c][s0 + s] = acc[r][c][s];
    }
}

static inline __attribute__((always_inline)) void tile(const dots_args *d, int64_t r0, int rows, int64_t c0,
                                                       int cols, int n_sums, int is_paired) {
    const int at_once = n_sums < SUMS_IN_REGISTERS / (rows * cols) ? n_sums : SUMS_IN_REGISTERS / (rows * cols);
    const uint16_t *a = d->a + r0 * d->lda;
    const float *b = d->b + c0 * d->ldb;
    const int64_t full = d->n - d->n % (LANES * n_sums);
    vector sums[MOST_ROWS][MOST_COLS][MOST_SUMS];
    int64_t end = at_once < n_sums && full > STRETCH ? STRETCH : full;
    add_stretch(d, a, rows, b, cols, n_sums, at_once, 0, end, sums);
    for (int64_t begin = end; begin < full; begin = end) {
        end = full - begin < STRETCH ? full : begin + STRETCH;
        add_stretch(d, a, rows, b, cols, n_sums, at_once, begin, end, sums);
    }
    __m256 joined[MOST_ROWS][MOST_COLS];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < cols; c++) joined[r][c] = vector_join(sums[r][c], n_sums);
    float *out = d->out + c0 * d->ldo + r0;
    if (rows == 2 && cols == 4) {
        bn_sum_2x4(joined[0], joined[1], is_paired, out, d->ldo);
    } else {
        for (int c = 0; c < cols; c++)
            for (int r = 0; r < rows; r++)
                out[c * d->ldo + r] = is_paired ? bn_sum_paired_8(joined[r][c]) : bn_sum_halving_8(joined[r][c]);
    }
    if (full == d->n) return;
    for (int c = 0; c < cols; c++)
        for (int r = 0; r < rows; r++) { /* only the binary16 dot has a rest */
            double total = out[c * d->ldo + r];
            for (int64_t i = full; i < d->n; i++)
                total += (double)_cvtsh_ss(a[r * d->lda + i]) * (double)b[c * d->ldb + i];
            out[c * d->ldo + r] = (float)total;
        }
}

static inline __attribute__((always_inline)) void tiles(const dots_args *d, int64_t n_rows, int rows, int64_t c0,
                                                        int cols, int n_sums, int is_paired) {
    int64_t r = 0;
    for (; r + rows <= n_rows; r += rows) tile(d, r, rows, c0, cols, n_sums, is_paired);
    for (; r < n_rows; r++) tile(d, r, 1, c0, cols, n_sums, is_paired);
}

/* `is_paired`: the last 4 lanes are added as adjacent pairs instead of by halving. */
static inline __attribute__((always_inline)) void dots(const dots_args *d, int64_t n_rows, int64_t n_cols,
                                                       int n_sums, int is_paired) {
    int64_t c = 0;
    for (; c + 4 <= n_cols; c += 4) tiles(d, n_rows, 2, c, 4, n_sums, is_paired);
    for (; c + 2 <= n_cols; c += 2) tiles(d, n_rows, n_sums < 4 ? 4 : 2, c, 2, n_sums, is_paired);
    /* a single column is bound by memory where it is long: one row is one stream */
    for (; c < n_cols; c++) tiles(d, n_rows, n_sums < 4 ? 4 : 1, c, 1, n_sums, is_paired);
}

#define DEFINE_DOTS(name, n_sums, is_paired)                                                                      \
    void name(const uint16_t *a, int64_t lda, int64_t n_rows, const float *b, int64_t ldb, int64_t n_cols,        \
              int64_t n, float *out, int64_t ldo) {                                                               \
        const dots_args d = {a, lda, b, ldb, n, out, ldo, n < AHEAD / 2 ? AHEAD / n : 2};                         \
        dots(&d, n_rows, n_cols, n_sums, is_paired);                                                              \
    }
