/* Passes over quantised weights and activations. */
#include <math.h>
#include <stdint.h>

static const float LEVELS[16] = {
    -1.0f,           -0.69619280099f, -0.52507305145f, -0.39491748809f, -0.28444138169f, -0.18477343022f,
    -0.09105003625f, 0.0f,            0.07958029955f,  0.16093020141f,  0.24611230194f,  0.33791524171f,
    0.44070982933f,  0.56261700391f,  0.72295683622f,  1.0f};

/* y [rows, width] = rows first_row ... of the NF4 weight, times row_scale (all ones where NULL).
 *
 * Blocks run across rows, so a row may start inside a block and on the low nibble. A table of 256 pairs turns a byte
 * into two values with one load; it is exact, as it holds levels, not products. */
void pk_nf4(const uint8_t *restrict packed, const float *restrict absmax, const float *restrict row_scale,
            float *restrict y, int64_t rows, int64_t width, int64_t row_stride, int64_t blocksize, int64_t first_row,
            int threads) {
  float pairs[256][2];
  for (int byte = 0; byte < 256; byte++) {
    pairs[byte][0] = LEVELS[byte >> 4];
    pairs[byte][1] = LEVELS[byte & 15];
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t m = 0; m < rows; m++) {
    int64_t i = (first_row + m) * width, end = i + width;
    float *out = y + m * row_stride, factor = row_scale ? row_scale[first_row + m] : 1.0f;
    while (i < end) {
      int64_t block = i / blocksize, stop = (block + 1) * blocksize;
      float scale = absmax[block];
      if (stop > end) stop = end;
      if (i & 1) *out++ = LEVELS[packed[i++ >> 1] & 15] * scale * factor;
      int64_t bytes = (stop - i) >> 1;
      const uint8_t *from = packed + (i >> 1);
      for (int64_t b = 0; b < bytes; b++) {
        out[2 * b] = pairs[from[b]][0] * scale * factor;
        out[2 * b + 1] = pairs[from[b]][1] * scale * factor;
      }
      out += 2 * bytes;
      i += 2 * bytes;
      if (i < stop) *out++ = LEVELS[packed[i++ >> 1] >> 4] * scale * factor;
    }
  }
}
