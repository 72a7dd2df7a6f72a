// RMSNorm of rows as the modules of decoder models compute it.
#pragma once

#include <cstdint>

#include "types.h"

namespace dyndepth {

// Where the modules round: Llama's gain * round(x / rms), Gemma's round(x / rms * (1 + gain)).
enum class NormStyle : int64_t { llama = 0, gemma = 1 };

// to[row] = norm(from[row]) for `rows` dense rows, in parallel; `to` may be `from`. gain has `width` entries, or is
// null for none.
template <class T>
void rms_norm(const T* from, T* to, int64_t rows, int64_t width, const T* gain, NormStyle style, float eps);

}  // namespace dyndepth
