/* Attention, float32: softmax(scale q k^T) v in blocks of 64 queries by 64 keys, scores never in memory.
 *
 * Scores are made transposed, S^T = K (scale Q)^T: the queries of a block lie along the vector, so maxima, sums and
 * rescaling of the online softmax are plain vector operations and no product needs a transposed copy of keys or values.
 * A unit of work (batch, key head) owns its dk and dv: no atomics, and the same bits with any number of threads.
 */
#include <stdlib.h>

#include "exp.h"

enum { BLOCK = 64 };

#ifdef __AVX512F__
enum { LANES = 16, TILE_ROWS = 8 };
#else
enum { LANES = 8, TILE_ROWS = 4 };
#endif
enum { TILE_COLUMNS = 2 * LANES };

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4)));

/* A [batch, head, position, feature] tensor whose features are contiguous. */
typedef struct {
  float *data;
  int64_t batch, head, position;
} tensor4;

typedef struct {
  int64_t batches, heads, key_heads, queries, keys, features;
  float scale;
  int causal, threads;
  const uint8_t *mask; /* 1 where a query may see a key, or NULL */
  int64_t mask_batch, mask_query;
  int64_t prefix; /* keys before the others that every query sees, numbered -prefix .. -1 */
  const float *gate; /* by head: the prefix has a softmax of its own, and this share in the output; or NULL */
} problem;

static inline float *rows_of(tensor4 t, int64_t b, int64_t h, int64_t start) {
  return t.data + b * t.batch + h * t.head + start * t.position;
}

/* rows x TILE_COLUMNS of c (+)= a b, accumulated in registers; a is read element by element at any strides */
static inline __attribute__((always_inline)) void tile(const float *a, int64_t a_row, int64_t a_col, const float *b,
                                                       int64_t b_row, float *c, int64_t c_row, int64_t depth,
                                                       int accumulate, const int rows) {
  vec sum[TILE_ROWS][2];
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++) {
    sum[i][0] = accumulate ? *(const vec *)(c + i * c_row) : (vec){0};
    sum[i][1] = accumulate ? *(const vec *)(c + i * c_row + LANES) : (vec){0};
  }
  for (int64_t p = 0; p < depth; p++) {
    vec b0 = *(const vec *)(b + p * b_row), b1 = *(const vec *)(b + p * b_row + LANES);
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
      float x = a[i * a_row + p * a_col];
      sum[i][0] += x * b0;
      sum[i][1] += x * b1;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++) {
    *(vec *)(c + i * c_row) = sum[i][0];
    *(vec *)(c + i * c_row + LANES) = sum[i][1];
  }
}

/* c [m, n] (+)= a [m, depth] b [depth, n]; n is a multiple of TILE_COLUMNS */
static void multiply(const float *a, int64_t a_row, int64_t a_col, const float *b, int64_t b_row, float *c,
                     int64_t c_row, int64_t m, int64_t n, int64_t depth, int accumulate) {
  for (int64_t j = 0; j < n; j += TILE_COLUMNS) {
    int64_t i = 0;
    for (; i + TILE_ROWS <= m; i += TILE_ROWS)
      tile(a + i * a_row, a_row, a_col, b + j, b_row, c + i * c_row + j, c_row, depth, accumulate, TILE_ROWS);
    for (; i < m; i++) tile(a + i * a_row, a_row, a_col, b + j, b_row, c + i * c_row + j, c_row, depth, accumulate, 1);
  }
}

/* t [features, BLOCK] = scale x^T for x [count, features]; missing columns are 0 */
static void transpose(const float *x, int64_t stride, int64_t count, int64_t features, float scale, float *t) {
  for (int64_t i = 0; i < BLOCK; i++)
    for (int64_t d = 0; d < features; d++) t[d * BLOCK + i] = i < count ? x[i * stride + d] * scale : 0.0f;
}

/* Scores that a query must not see become minus infinity. s is [count, BLOCK], keys by queries. */
static void hide(const problem *p, int64_t b, int64_t first_query, int64_t queries, int64_t first_key, int64_t count,
                 float *s) {
  if (p->causal && first_key + count > first_query) {
    for (int64_t j = 0; j < count; j++) {
      int64_t visible_from = first_key + j - first_query;
      for (int64_t i = 0; i < visible_from && i < BLOCK; i++) s[j * BLOCK + i] = -INFINITY;
    }
  }
  if (p->mask) {
    const uint8_t *mask = p->mask + b * p->mask_batch + first_query * p->mask_query + first_key;
    for (int64_t i = 0; i < queries; i++)
      for (int64_t j = 0; j < count; j++)
        if (!mask[i * p->mask_query + j]) s[j * BLOCK + i] = -INFINITY;
  }
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Keys that a block of queries can see at all. */
static inline int64_t key_limit(const problem *p, int64_t first_query, int64_t queries) {
  return p->causal ? least(p->keys, first_query + queries) : p->keys;
}

/* How many keys the block has that starts at j0; it is of the prefix or of the others, never of both. */
static inline int64_t block_keys(int64_t j0, int64_t limit) { return least(BLOCK, j0 < 0 ? -j0 : limit - j0); }

/* Rows of the block that starts at key j0, from the prefix where that is negative. */
static inline float *key_rows_of(const problem *p, const tensor4 *prefix, const tensor4 *others, int64_t b, int64_t h,
                                 int64_t j0) {
  return j0 < 0 ? rows_of(*prefix, b, h, p->prefix + j0) : rows_of(*others, b, h, j0);
}

/* o, top and sum of the online softmax of a block of queries over the keys from .. to - 1; s is work space. */
static void attend(const problem *p, const tensor4 *k, const tensor4 *v, const tensor4 *prefix_k,
                   const tensor4 *prefix_v, int64_t b, int64_t h, int64_t first, int64_t count, int64_t from, int64_t to,
                   const float *qt, float *s, float *o, float *top, float *sum) {
  int64_t D = p->features, kh = h / (p->heads / p->key_heads);
  float shrink[BLOCK];
  for (int64_t i = 0; i < BLOCK; i++) top[i] = -INFINITY, sum[i] = 0.0f;
  memset(o, 0, (size_t)(BLOCK * D) * sizeof(float));
  for (int64_t j0 = from, keys; j0 < to; j0 += keys) {
    const tensor4 *ks = j0 < 0 ? prefix_k : k, *vs = j0 < 0 ? prefix_v : v;
    keys = block_keys(j0, to);
    multiply(key_rows_of(p, prefix_k, k, b, kh, j0), ks->position, 1, qt, BLOCK, s, BLOCK, keys, BLOCK, D, 0);
    if (j0 >= 0) hide(p, b, first, count, j0, keys, s);
    float peak[BLOCK];
    memcpy(peak, top, sizeof peak);
    for (int64_t j = 0; j < keys; j++) {
#pragma omp simd
      for (int64_t i = 0; i < BLOCK; i++) peak[i] = s[j * BLOCK + i] > peak[i] ? s[j * BLOCK + i] : peak[i];
    }
#pragma omp simd
    for (int64_t i = 0; i < BLOCK; i++) {
      float base = peak[i] == -INFINITY ? 0.0f : peak[i]; /* a row that sees nothing yet */
      shrink[i] = exp_f32(top[i] - base);
      top[i] = peak[i];
      peak[i] = base;
      sum[i] *= shrink[i];
    }
    for (int64_t j = 0; j < keys; j++) {
#pragma omp simd
      for (int64_t i = 0; i < BLOCK; i++) {
        float e = exp_f32(s[j * BLOCK + i] - peak[i]);
        s[j * BLOCK + i] = e;
        sum[i] += e;
      }
    }
    if (j0 > from) {
      for (int64_t i = 0; i < count; i++) {
#pragma omp simd
        for (int64_t d = 0; d < D; d++) o[i * D + d] *= shrink[i];
      }
    }
    multiply(s, 1, BLOCK, key_rows_of(p, prefix_v, v, b, kh, j0), vs->position, o, D, count, D, keys, 1);
  }
}

/* y (+)= weight o / sum and the log-sum-exp; a query that sees nothing gives 0 and 0 */
static void finish(const float *o, const float *top, const float *sum, float weight, int add, int64_t count, int64_t D,
                   float *y, int64_t y_row, float *lse) {
  for (int64_t i = 0; i < count; i++) {
    float inverse = sum[i] > 0.0f ? weight / sum[i] : (sum[i] == 0.0f ? 0.0f : sum[i]);
    lse[i] = sum[i] == 0.0f ? 0.0f : top[i] + logf(sum[i]);
    if (add) {
#pragma omp simd
      for (int64_t d = 0; d < D; d++) y[i * y_row + d] += o[i * D + d] * inverse;
    } else {
#pragma omp simd
      for (int64_t d = 0; d < D; d++) y[i * y_row + d] = o[i * D + d] * inverse;
    }
  }
}

/* Returns 0, or 1 where there is no memory for the work space. lse is [batches, heads, queries], with a gate two of them:
 * that of the keys and that of the prefix. */
int pk_attention(const problem *p, const tensor4 *q, const tensor4 *k, const tensor4 *v, const tensor4 *prefix_k,
                 const tensor4 *prefix_v, const tensor4 *out, float *lse) {
  int64_t blocks = (p->queries + BLOCK - 1) / BLOCK, D = p->features, rows = p->batches * p->heads * p->queries;
  int64_t space = D * BLOCK + BLOCK * BLOCK + BLOCK * D, failed = 0;
#pragma omp parallel num_threads(p->threads)
  {
    float *qt = aligned_alloc(64, (size_t)space * sizeof(float));
    if (!qt) {
#pragma omp atomic write
      failed = 1;
    }
    float *s = qt + D * BLOCK, *o = s + BLOCK * BLOCK;
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < p->batches * p->heads * blocks; unit++) {
      if (!qt) continue;
      int64_t block = blocks - 1 - unit % blocks, h = unit / blocks % p->heads, b = unit / blocks / p->heads;
      int64_t first = block * BLOCK, count = least(BLOCK, p->queries - first), limit = key_limit(p, first, count);
      float top[BLOCK], sum[BLOCK];
      float *y = rows_of(*out, b, h, first), *l = lse + (b * p->heads + h) * p->queries + first;
      transpose(rows_of(*q, b, h, first), q->position, count, D, p->scale, qt);
      if (p->gate) {
        attend(p, k, v, prefix_k, prefix_v, b, h, first, count, -p->prefix, 0, qt, s, o, top, sum);
        finish(o, top, sum, p->gate[h], 0, count, D, y, out->position, l + rows);
      }
      attend(p, k, v, prefix_k, prefix_v, b, h, first, count, p->gate ? 0 : -p->prefix, limit, qt, s, o, top, sum);
      finish(o, top, sum, 1.0f, p->gate != NULL, count, D, y, out->position, l);
    }
    free(qt);
  }
  return (int)failed;
}

/* s [keys, BLOCK] = weight exp(scale k q^T - lse), ds = dout v^T, for the block of keys that starts at j0 */
static void probabilities(const problem *p, const tensor4 *k, const tensor4 *v, const tensor4 *prefix_k,
                          const tensor4 *prefix_v, int64_t b, int64_t kh, int64_t first, int64_t count, int64_t j0,
                          int64_t keys, const float *qt, const float *gt, const float *lse, float weight, float *s,
                          float *ds) {
  int64_t D = p->features, k_row = (j0 < 0 ? prefix_k : k)->position, v_row = (j0 < 0 ? prefix_v : v)->position;
  multiply(key_rows_of(p, prefix_k, k, b, kh, j0), k_row, 1, qt, BLOCK, s, BLOCK, keys, BLOCK, D, 0);
  if (j0 >= 0) hide(p, b, first, count, j0, keys, s);
  multiply(key_rows_of(p, prefix_v, v, b, kh, j0), v_row, 1, gt, BLOCK, ds, BLOCK, keys, BLOCK, D, 0);
  for (int64_t j = 0; j < keys; j++) {
#pragma omp simd
    for (int64_t i = 0; i < BLOCK; i++) s[j * BLOCK + i] = weight * exp_f32(s[j * BLOCK + i] - lse[i]);
  }
}

/* With P = exp(scale q k^T - lse), delta = rowsum(dout out), dS = P (dout v^T - delta):
 * dv = P^T dout, dk = scale dS^T q, dq = scale dS k. All of dq, dk, dv is written, and of the prefix's, by batch.
 * With a gate g and the prefix's P2: delta2 = rowsum(P2 (dout v2^T)), dS2 = g P2 (dout v2^T - delta2), dv2 = g P2^T dout,
 * dgate [batches, heads] = sum(delta2), and delta is without g delta2, the prefix's part of the output. */
int pk_attention_backward(const problem *p, const tensor4 *dout, const tensor4 *q, const tensor4 *k, const tensor4 *v,
                          const tensor4 *prefix_k, const tensor4 *prefix_v, const tensor4 *out, const float *lse,
                          const tensor4 *dq, const tensor4 *dk, const tensor4 *dv, const tensor4 *prefix_dk,
                          const tensor4 *prefix_dv, float *dgate) {
  int64_t D = p->features, group = p->heads / p->key_heads, rows = p->batches * p->heads * p->queries, failed = 0;
  int64_t space = 2 * D * BLOCK + 2 * BLOCK * BLOCK + BLOCK * D;
#pragma omp parallel num_threads(p->threads)
  {
    float *qt = aligned_alloc(64, (size_t)space * sizeof(float));
    if (!qt) {
#pragma omp atomic write
      failed = 1;
    }
    float *gt = qt + D * BLOCK, *s = gt + D * BLOCK, *ds = s + BLOCK * BLOCK, *dq_block = ds + BLOCK * BLOCK;
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < p->batches * p->key_heads; unit++) {
      if (!qt) continue;
      int64_t kh = unit % p->key_heads, b = unit / p->key_heads;
      for (int64_t j = -p->prefix; j < p->keys; j++) {
        memset(key_rows_of(p, prefix_dk, dk, b, kh, j), 0, (size_t)D * sizeof(float));
        memset(key_rows_of(p, prefix_dv, dv, b, kh, j), 0, (size_t)D * sizeof(float));
      }
      for (int64_t h = kh * group; h < (kh + 1) * group; h++) {
        float share = p->gate ? p->gate[h] : 1.0f;
        double gate_sum = 0.0;
        for (int64_t first = 0; first < p->queries; first += BLOCK) {
          int64_t count = least(BLOCK, p->queries - first), limit = key_limit(p, first, count);
          const float *g = rows_of(*dout, b, h, first), *y = rows_of(*out, b, h, first);
          const float *l = lse + (b * p->heads + h) * p->queries + first, *queries = rows_of(*q, b, h, first);
          float delta[BLOCK] = {0}, log_sum[BLOCK] = {0}, prefix_delta[BLOCK] = {0}, prefix_log_sum[BLOCK] = {0};
          for (int64_t i = 0; i < count; i++) {
            float total = 0.0f;
#pragma omp simd reduction(+ : total)
            for (int64_t d = 0; d < D; d++) total += g[i * dout->position + d] * y[i * out->position + d];
            delta[i] = total;
            log_sum[i] = l[i];
            if (p->gate) prefix_log_sum[i] = l[rows + i];
          }
          transpose(queries, q->position, count, D, p->scale, qt);
          transpose(g, dout->position, count, D, 1.0f, gt);
          if (p->gate) {
            double sums[BLOCK] = {0};
            for (int64_t j0 = -p->prefix, keys; j0 < 0; j0 += keys) {
              keys = block_keys(j0, 0);
              probabilities(p, k, v, prefix_k, prefix_v, b, kh, first, count, j0, keys, qt, gt, prefix_log_sum, 1.0f, s, ds);
              for (int64_t j = 0; j < keys; j++) {
#pragma omp simd
                for (int64_t i = 0; i < BLOCK; i++) sums[i] += (double)s[j * BLOCK + i] * (double)ds[j * BLOCK + i];
              }
            }
            /* the two parts of the output may cancel: sums of float products in double have no error of their own */
            for (int64_t i = 0; i < count; i++) {
              double total = 0.0;
#pragma omp simd reduction(+ : total)
              for (int64_t d = 0; d < D; d++) total += (double)g[i * dout->position + d] * (double)y[i * out->position + d];
              gate_sum += sums[i];
              prefix_delta[i] = (float)sums[i];
              delta[i] = (float)(total - (double)share * sums[i]);
            }
          }
          for (int64_t j0 = -p->prefix, keys; j0 < limit; j0 += keys) {
            int before = j0 < 0, apart = before && p->gate;
            const tensor4 *ks = before ? prefix_k : k, *dks = before ? prefix_dk : dk, *dvs = before ? prefix_dv : dv;
            const float *shift = apart ? prefix_delta : delta;
            keys = block_keys(j0, limit);
            probabilities(p, k, v, prefix_k, prefix_v, b, kh, first, count, j0, keys, qt, gt,
                          apart ? prefix_log_sum : log_sum, apart ? share : 1.0f, s, ds);
            for (int64_t j = 0; j < keys; j++) {
#pragma omp simd
              for (int64_t i = 0; i < BLOCK; i++)
                ds[j * BLOCK + i] = s[j * BLOCK + i] * (ds[j * BLOCK + i] - shift[i]) * p->scale;
            }
            multiply(s, BLOCK, 1, g, dout->position, key_rows_of(p, prefix_dv, dv, b, kh, j0), dvs->position, keys, D,
                     count, 1);
            multiply(ds, BLOCK, 1, queries, q->position, key_rows_of(p, prefix_dk, dk, b, kh, j0), dks->position, keys, D,
                     count, 1);
            multiply(ds, 1, BLOCK, key_rows_of(p, prefix_k, k, b, kh, j0), ks->position, dq_block, D, count, D, keys,
                     j0 > -p->prefix);
          }
          for (int64_t i = 0; i < count; i++)
            memcpy(rows_of(*dq, b, h, first + i), dq_block + i * D, (size_t)D * sizeof(float));
        }
        if (p->gate) dgate[b * p->heads + h] = (float)gate_sum;
      }
    }
    free(qt);
  }
  return (int)failed;
}
