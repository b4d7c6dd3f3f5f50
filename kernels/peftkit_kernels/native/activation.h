/* The activations of gated MLPs and their slopes; vectorised by the compiler inside `omp simd` loops. */
#ifndef PEFTKIT_ACTIVATION_H
#define PEFTKIT_ACTIVATION_H

#include "exp.h"

enum { SILU = 0, GELU_TANH = 1 };

/* act(x) and act'(x) */
static inline void silu(float x, float *value, float *slope) {
  float s = 1.0f / (1.0f + exp_f32(-x));
  *value = x * s;
  *slope = s * (1.0f + x * (1.0f - s));
}

/* 0.5 (1 + tanh(u)) is sigmoid(2u), and 1 - tanh(u)^2 is 4 sigmoid(2u) sigmoid(-2u): nothing cancels. Beyond 9 both are
 * constant in float32, and neither x^2 nor e^-2u overflows below. */
static inline void gelu_tanh(float x, float *value, float *slope) {
  float b = x < -9.0f ? -9.0f : (x > 9.0f ? 9.0f : x);
  float e = exp_f32(-1.59576912f * fmaf(0.044715f * b * b, b, b));
  float s = 1.0f / (1.0f + e);
  *value = x * s;
  *slope = fmaf(1.59576912f * b * s, e * s * fmaf(0.134145f * b, b, 1.0f), s);
}

#endif
