/* Quantise W + scale (B A) as bitsandbytes stores it and decode it again, row by row while the row is in the cache.
 *
 * Each helper is a function that is not inlined: a product and the sum it goes into are then in different functions, so that no
 * compiler makes one instruction of them. Every product and every sum is rounded, as in torch. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define APART __attribute__((noinline))
#define LARGEST(a, b) ((a) > (b) ? (a) : (b))

enum { SPAN = 4096 }; /* elements at a time; a whole number of blocks of any size */
enum { NF4_ROUND = 1, INT8_ROUND = 2 };

static const float LEVELS[16] = {
    -1.0f,           -0.69619280099f, -0.52507305145f, -0.39491748809f, -0.28444138169f, -0.18477343022f,
    -0.09105003625f, 0.0f,            0.07958029955f,  0.16093020141f,  0.24611230194f,  0.33791524171f,
    0.44070982933f,  0.56261700391f,  0.72295683622f,  1.0f};

/* w = the elements first ... of an NF4 weight; first and count are whole blocks */
static APART void decode_nf4(const float (*pairs)[2], const uint8_t *restrict packed, const float *restrict absmax,
                             float *restrict w, int64_t first, int64_t count, int64_t blocksize) {
  const uint8_t *from = packed + (first >> 1);
  const float *scale = absmax + first / blocksize;
  for (int64_t start = 0; start < count; start += blocksize, scale++) {
    for (int64_t k = start; k < start + blocksize; k += 2) {
      const float *pair = pairs[*from++];
      w[k] = pair[0] * *scale;
      w[k + 1] = pair[1] * *scale;
    }
  }
}

/* w = codes absmax / 127, in the order of bitsandbytes, which multiplies by the rounded 1 / 127 last */
static APART void decode_int8(const int8_t *restrict codes, float absmax, float *restrict w, int64_t count) {
#pragma omp simd
  for (int64_t k = 0; k < count; k++) w[k] = (float)codes[k] * absmax * 7.874015718698502e-3f;
}

static APART void scale_by(float *restrict t, float scale, int64_t count) {
#pragma omp simd
  for (int64_t k = 0; k < count; k++) t[k] *= scale;
}

static APART void add(float *restrict t, const float *restrict w, int64_t count) {
#pragma omp simd
  for (int64_t k = 0; k < count; k++) t[k] += w[k];
}

/* The largest magnitude. Magnitudes are compared as integers, so NaN is the largest of all. */
static APART float largest(const float *restrict t, int64_t count) {
  int32_t top = 0;
#pragma omp simd reduction(max : top)
  for (int64_t k = 0; k < count; k++) {
    int32_t bits;
    memcpy(&bits, t + k, 4);
    bits &= 0x7fffffff;
    top = LARGEST(bits, top);
  }
  float found;
  memcpy(&found, &top, 4);
  return found;
}

#define UP(i) level = u > (LEVELS[i] + LEVELS[(i) + 1]) / 2 ? LEVELS[(i) + 1] : level;

/* The level of each element of a block, found relative to the block's maximum, times the stored maximum. */
static APART void round_block(float *restrict t, float maximum, float absmax, int64_t count) {
  float inverse = 1.0f / LARGEST(maximum, 1e-38f);
#pragma omp simd
  for (int64_t k = 0; k < count; k++) {
    float u = t[k] * inverse, level = LEVELS[0];
    UP(0) UP(1) UP(2) UP(3) UP(4) UP(5) UP(6) UP(7) UP(8) UP(9) UP(10) UP(11) UP(12) UP(13) UP(14)
    t[k] = level * absmax;
  }
}

/* Each element rounded to float16, ties to even. Below 2^-14 float16 has steps of 2^-24, which are the steps of float32 above 1/2. */
static APART void round_to_half(float *restrict t, int64_t count) {
#pragma omp simd
  for (int64_t k = 0; k < count; k++) {
    float size = fabsf(t[k]), wide, small = (size + 0.5f) - 0.5f;
    int32_t bits;
    memcpy(&bits, &size, 4);
    bits = (bits + 0xfff + ((bits >> 13) & 1)) & ~0x1fff;
    memcpy(&wide, &bits, 4);
    wide = size < 0x1p-14f ? small : wide;
    wide = size >= 65520.0f ? INFINITY : wide;
    t[k] = copysignf(size == size ? wide : size, t[k]);
  }
}

static APART void round_row(float *restrict t, int64_t count) {
  round_to_half(t, count);
  float top = largest(t, count);
  float factor = top == 0.0f ? 0.0f : 127.0f * (1.0f / top), step = top / 127.0f;
#pragma omp simd
  for (int64_t k = 0; k < count; k++) t[k] = rintf(t[k] * factor) * step;
}

/* t = W + scale t for t [rows, width], which is B A. The weight W is given as NF4 (packed, absmax), int8 (codes, absmax), float32
 * (dense), or not at all if t has it already. rounds says what follows: nothing, NF4_ROUND or INT8_ROUND. The block maxima of the
 * sum are written to maxima unless that is NULL. */
void pk_merge(const uint8_t *restrict packed, const int8_t *restrict codes, const float *restrict absmax,
              const float *restrict dense, float *restrict t, float *restrict maxima, int64_t rows, int64_t width,
              int64_t dense_stride, int64_t blocksize, float scale, int rounds, int threads) {
  float pairs[256][2];
  for (int byte = 0; byte < 256; byte++) {
    pairs[byte][0] = LEVELS[byte >> 4];
    pairs[byte][1] = LEVELS[byte & 15];
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t m = 0; m < rows; m++) {
    float *row = t + m * width, weight[SPAN];
    for (int64_t start = 0; start < width; start += SPAN) {
      int64_t count = width - start < SPAN ? width - start : SPAN, first = m * width + start;
      float *part = row + start;
      if (scale != 1.0f) scale_by(part, scale, count);
      if (packed) decode_nf4((const float(*)[2])pairs, packed, absmax, weight, first, count, blocksize);
      if (codes) decode_int8(codes + first, absmax[m], weight, count);
      if (packed || codes)
        add(part, weight, count);
      else if (dense)
        add(part, dense + m * dense_stride + start, count);
      if (rounds == INT8_ROUND || !(maxima || rounds)) continue;
      for (int64_t block = 0; block < count; block += blocksize) {
        float top = largest(part + block, blocksize);
        if (maxima) maxima[(first + block) / blocksize] = top;
        if (rounds) round_block(part + block, top, top, blocksize);
      }
    }
    if (rounds == INT8_ROUND) round_row(row, width);
  }
}

/* t [blocks, blocksize] = the nearest levels relative to maxima, times absmax */
void pk_round_nf4(float *restrict t, const float *restrict maxima, const float *restrict absmax, int64_t blocks,
                  int64_t blocksize, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t b = 0; b < blocks; b++) round_block(t + b * blocksize, maxima[b], absmax[b], blocksize);
}
