// Checks of a layer's tensors, which belong together.
#pragma once

#include "adakv/kv_cache.h"
#include "ops/check.h"

namespace adakv {

/// The head dim D that was bound.
void check_head_dim(const Checker& check);

/// Names of a tensor's dimensions, the last of which is that of a layer's values: `same` as that of its
/// keys, or `own`.
const char* value_dims(const LayerView& layer, const char* same, const char* own);

/// Tails of int4 and int2, [B, Hkv, 2 P, D] or of other rows.
void check_tails(Checker& check, const char* name, const TensorView& tails, const char* dims);

/// A layer, behind the checks of D and of the dtype of keys or queries.
void check_layer(Checker& check, const LayerView& layer);

/// A layer that no keys or queries come with: D is that of its pages. Not of a layer with tails.
void check_held_layer(Checker& check, const LayerView& layer);

/// The same of any format.
void check_any_layer(Checker& check, const LayerView& layer);

}  // namespace adakv
