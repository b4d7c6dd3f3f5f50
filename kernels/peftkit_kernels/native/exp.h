/* The exponential every pass shares; vectorised by the compiler inside `omp simd` loops. */
#ifndef PEFTKIT_EXP_H
#define PEFTKIT_EXP_H

#include <math.h>
#include <stdint.h>
#include <string.h>

/* e^x: range reduction to |r| <= ln2/2 and a degree-6 polynomial (error below 2 units in the last place);
 * 0 below the smallest normal result, infinity above the largest, NaN for NaN. */
static inline float exp_f32(float x) {
  float bounded = x < -87.33654f ? -87.33654f : (x > 88.72283f ? 88.72283f : x);
  float n = rintf(bounded * 1.44269504f);
  float r = fmaf(n, -0.693145752f, bounded);
  r = fmaf(n, -1.42860677e-6f, r);
  float p = 1.38887997e-3f;
  p = fmaf(p, r, 8.33333333e-3f);
  p = fmaf(p, r, 4.16666667e-2f);
  p = fmaf(p, r, 1.66666667e-1f);
  p = fmaf(p, r, 0.5f);
  p = fmaf(p, r, 1.0f);
  p = fmaf(p, r, 1.0f);
  /* 2^n in two factors: n reaches 128, which is no float exponent */
  int32_t exponent = (int32_t)n, half = exponent >> 1;
  int32_t bits0 = (half + 127) << 23, bits1 = (exponent - half + 127) << 23;
  float scale0, scale1;
  memcpy(&scale0, &bits0, 4);
  memcpy(&scale1, &bits1, 4);
  float y = p * scale0 * scale1;
  return x < -87.33654f ? 0.0f : (x > 88.72283f ? INFINITY : y);
}

#endif
