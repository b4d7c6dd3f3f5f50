/* Products of 8-bit codes for processors without 8-bit dot products (AVX-512 VNNI, AMX): a tile is summed in registers.
 *
 * Codes are widened to 16 bits and paired along the summed axis, so that one instruction multiplies two of them and adds
 * the pair into 32 bits. Sums are exact: 2 * 127 * 127 * pairs < 2^31 for the widths that the caller accepts.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifdef __AVX512BW__
typedef __m512i ivec;
enum { LANES = 16, ROWS = 12 };
static inline ivec pairs_at(const int16_t *p) { return _mm512_loadu_si512(p); }
static inline ivec pair_everywhere(int32_t pair) { return _mm512_set1_epi32(pair); }
static inline ivec add_products(ivec sum, ivec a, ivec b) { return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b)); }
#elif defined(__AVX2__)
typedef __m256i ivec;
enum { LANES = 8, ROWS = 6 };
static inline ivec pairs_at(const int16_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
static inline ivec pair_everywhere(int32_t pair) { return _mm256_set1_epi32(pair); }
static inline ivec add_products(ivec sum, ivec a, ivec b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
#else
enum { LANES = 8, ROWS = 4 };
typedef struct { int32_t lane[LANES]; } ivec;
static inline ivec pairs_at(const int16_t *p) {
  ivec v;
  memcpy(&v, p, sizeof v);
  return v;
}
static inline ivec pair_everywhere(int32_t pair) {
  ivec v;
  for (int i = 0; i < LANES; i++) v.lane[i] = pair;
  return v;
}
static inline ivec add_products(ivec sum, ivec a, ivec b) {
  for (int i = 0; i < LANES; i++) {
    int16_t x[2], y[2];
    memcpy(x, &a.lane[i], sizeof x);
    memcpy(y, &b.lane[i], sizeof y);
    sum.lane[i] += (int32_t)x[0] * y[0] + (int32_t)x[1] * y[1];
  }
  return sum;
}
#endif

enum { COLUMNS = 2 * LANES, DEPTH = 256, PANELS = 8 };
/* A panel has COLUMNS columns. DEPTH pairs of a panel are packed, PANELS panels at a time, so that they stay in the
 * second-level cache while all rows are multiplied by them. */

/* The bytes of vector registers that the products use, 0 if they are plain C. */
int pk_int8_register_bytes(void) {
#ifdef __AVX2__
  return LANES * 4;
#else
  return 0;
#endif
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int32_t pair_of(int8_t low, int8_t high) {
  int16_t both[2] = {low, high};
  int32_t pair;
  memcpy(&pair, both, sizeof pair);
  return pair;
}

/* packed [pairs, ROWS] = rows of a [count, depth], zero where there is no row and behind an odd depth */
static void pack_rows(const int8_t *a, int64_t stride, int64_t count, int64_t depth, int32_t *packed) {
  int64_t pairs = (depth + 1) / 2;
  for (int64_t i = 0; i < ROWS; i++) {
    const int8_t *row = a + i * stride;
    for (int64_t p = 0; p < pairs; p++) {
      int8_t high = 2 * p + 1 < depth && i < count ? row[2 * p + 1] : 0;
      packed[p * ROWS + i] = i < count ? pair_of(row[2 * p], high) : 0;
    }
  }
}

/* packed [pairs, COLUMNS, 2] = columns of w [depth, count] at any strides, zero where there is none */
static void pack_columns(const int8_t *w, int64_t down, int64_t across, int64_t count, int64_t depth,
                         int16_t *packed) {
  int64_t pairs = (depth + 1) / 2;
  if (count < COLUMNS || depth % 2) memset(packed, 0, (size_t)(pairs * COLUMNS) * 2 * sizeof(int16_t));
  if (across == 1 && depth % 2 == 0 && count == COLUMNS) {
    for (int64_t p = 0; p < pairs; p++) {
      const int8_t *first = w + 2 * p * down, *second = first + down;
      int16_t *to = packed + p * COLUMNS * 2;
#pragma omp simd
      for (int64_t j = 0; j < COLUMNS; j++) {
        to[2 * j] = first[j];
        to[2 * j + 1] = second[j];
      }
    }
    return;
  }
  for (int64_t j = 0; j < count; j++) {
    const int8_t *column = w + j * across;
    int16_t *to = packed + 2 * j;
    for (int64_t p = 0; p < depth / 2; p++) {
      to[p * COLUMNS * 2] = column[2 * p * down];
      to[p * COLUMNS * 2 + 1] = column[(2 * p + 1) * down];
    }
    if (depth % 2) to[(pairs - 1) * COLUMNS * 2] = column[(depth - 1) * down];
  }
}

/* sums [ROWS, COLUMNS] (+)= a [pairs, ROWS] b [pairs, COLUMNS] */
static void tile(const int32_t *a, const int16_t *b, int64_t pairs, int32_t *sums, int accumulate) {
  ivec sum[ROWS][2];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++) {
    for (int h = 0; h < 2; h++) {
      if (accumulate)
        memcpy(&sum[i][h], sums + i * COLUMNS + h * LANES, sizeof(ivec));
      else
        memset(&sum[i][h], 0, sizeof(ivec));
    }
  }
  for (int64_t p = 0; p < pairs; p++) {
    ivec b0 = pairs_at(b + p * COLUMNS * 2), b1 = pairs_at(b + p * COLUMNS * 2 + LANES * 2);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) {
      ivec x = pair_everywhere(a[p * ROWS + i]);
      sum[i][0] = add_products(sum[i][0], x, b0);
      sum[i][1] = add_products(sum[i][1], x, b1);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++) {
    memcpy(sums + i * COLUMNS, &sum[i][0], sizeof(ivec));
    memcpy(sums + i * COLUMNS + LANES, &sum[i][1], sizeof(ivec));
  }
}

/* What a product is scaled with and what is added to it; see pk_int8_linear. */
typedef struct {
  const float *row_scale, *column_scale, *bias, *s, *t;
  float *y;
  int64_t columns, rank;
  int add;
} ending;

/* y of a tile that starts at row m and column n, from its sums */
static void finish(const ending *e, const int32_t *sums, int64_t m, int64_t rows, int64_t n, int64_t columns) {
  for (int64_t i = 0; i < rows; i++) {
    float update[COLUMNS] = {0};
    for (int64_t r = 0; r < e->rank; r++) {
      float factor = e->s[(m + i) * e->rank + r];
      const float *row = e->t + r * e->columns + n;
      if (columns == COLUMNS) {
#pragma omp simd
        for (int64_t j = 0; j < COLUMNS; j++) update[j] += factor * row[j];
      } else {
        for (int64_t j = 0; j < columns; j++) update[j] += factor * row[j];
      }
    }
    float *y = e->y + (m + i) * e->columns + n, own = e->row_scale[m + i];
#pragma omp simd
    for (int64_t j = 0; j < columns; j++) {
      float scale = e->column_scale ? own * e->column_scale[n + j] : own;
      float shift = update[j] + (e->bias ? e->bias[n + j] : 0.0f);
      float value = (float)sums[i * COLUMNS + j] * scale + shift;
      y[j] = e->add ? y[j] + value : value;
    }
  }
}

/* y [rows, columns] (+)= (a w) row_scale column_scale + bias + s t, for codes a [rows, depth] and w [depth, columns] at any
 * strides, s [rows, rank] and t [rank, columns]. column_scale, bias, s and t may be NULL. Returns 0, or 1 if there is no
 * memory for the work space: the rows in 16 bits, and for each thread its panels and their sums. */
int pk_int8_linear(const int8_t *a, const int8_t *w, const float *row_scale, const float *column_scale,
                   const float *bias, const float *s, const float *t, float *y, int64_t rows, int64_t columns,
                   int64_t depth, int64_t rank, int64_t w_down, int64_t w_across, int add, int threads) {
  ending e = {row_scale, column_scale, bias, s, t, y, columns, s ? rank : 0, add};
  int64_t row_blocks = (rows + ROWS - 1) / ROWS, panels = (columns + COLUMNS - 1) / COLUMNS;
  int64_t chunks = (depth + 2 * DEPTH - 1) / (2 * DEPTH), groups = (panels + PANELS - 1) / PANELS;
  /* chunk c of a row block starts at pair c * DEPTH of that block */
  int64_t block_pairs = (depth + 1) / 2;
  int32_t *packed = aligned_alloc(64, (size_t)((row_blocks * block_pairs * ROWS * 4 + 63) / 64 * 64));
  if (!packed) return 1;
  int failed = 0;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t block = 0; block < row_blocks; block++) {
      const int8_t *from = a + block * ROWS * depth;
      pack_rows(from, depth, least(ROWS, rows - block * ROWS), depth, packed + block * block_pairs * ROWS);
    }
    int64_t panel_size = DEPTH * COLUMNS * 2, tile_size = ROWS * COLUMNS;
    size_t space = (size_t)(PANELS * panel_size) * 2 + (size_t)(row_blocks * PANELS * tile_size) * 4;
    int16_t *panel = aligned_alloc(64, (space + 63) / 64 * 64);
    if (!panel) {
#pragma omp atomic write
      failed = 1;
    }
    int32_t *sums = (int32_t *)(panel + PANELS * panel_size);
#pragma omp for schedule(dynamic)
    for (int64_t group = 0; group < groups; group++) {
      if (!panel) continue;
      int64_t first = group * PANELS, count = least(PANELS, panels - first);
      for (int64_t chunk = 0; chunk < chunks; chunk++) {
        int64_t k = chunk * 2 * DEPTH, own = least(2 * DEPTH, depth - k), pairs = (own + 1) / 2;
        for (int64_t j = 0; j < count; j++) {
          int64_t n = (first + j) * COLUMNS;
          pack_columns(w + k * w_down + n * w_across, w_down, w_across, least(COLUMNS, columns - n), own,
                       panel + j * panel_size);
        }
        for (int64_t block = 0; block < row_blocks; block++) {
          const int32_t *from = packed + (block * block_pairs + chunk * DEPTH) * ROWS;
          for (int64_t j = 0; j < count; j++) {
            int32_t *here = sums + (block * PANELS + j) * tile_size;
            tile(from, panel + j * panel_size, pairs, here, chunk > 0);
            if (chunk + 1 < chunks) continue;
            int64_t n = (first + j) * COLUMNS, m = block * ROWS;
            finish(&e, here, m, least(ROWS, rows - m), n, least(COLUMNS, columns - n));
          }
        }
      }
    }
    free(panel);
  }
  free(packed);
  return failed;
}
