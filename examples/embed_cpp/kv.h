// Everything that this runtime has to do with adakv: what a prompt's layer keeps, and attention of
// new tokens to it. One sequence, on the CPU, in float32.
#pragma once

#include <adakv/adakv.h>

#include <cstdint>
#include <vector>

namespace embed {

struct Sizes {
  int32_t layers, heads, kv_heads, head_dim;
};

/// Ada-KV's policy with the defaults of its paper; with `critical`, CriticalKV selects within each
/// head's budget.
struct Policy {
  int32_t budget = 0;  // mean entries per kv head, the window included
  int32_t window = 32;
  bool is_critical = false;
};

class Kv {
 public:
  /// Room for what is kept of a prompt of `tokens` tokens, and for `max_new_tokens` after it.
  Kv(const Sizes& sizes, const Policy& policy, int64_t tokens, int64_t max_new_tokens);

  /// Takes a layer's prompt: keeps what the policy chooses and copies it into pages.
  /// queries [T, Hq * D], keys and values [T, Hkv * D], after RoPE; w_o [E, Hq * D].
  void take_prompt(
      int32_t layer, float* queries, float* keys, float* values, const float* w_o, int64_t width);

  /// Once for each new token, before the layers.
  void begin_step();

  /// Appends a new token's key and value [Hkv * D] to a layer; out [Hq * D] is the attention of its
  /// queries [Hq * D] to all that the layer holds.
  void attend(int32_t layer, float* queries, float* keys, float* values, float* out);

  /// Positions that each kv head of a layer holds, ascending.
  std::vector<std::vector<int32_t>> positions(int32_t layer) const;

  /// Bytes of the pages in use.
  size_t bytes() const { return cache_.pool().num_used() * cache_.page_bytes(); }

 private:
  adakv::CacheConfig config(int64_t max_new_tokens) const;
  int64_t num_kept() const;
  void choose(float* queries, float* keys, float* values, const float* w_o, int64_t width);

  template <typename Args>
  void run(void (*verb)(const Args&), Args& args);

  Sizes sizes_;
  Policy policy_;
  int64_t tokens_;
  adakv::KVCache cache_;
  int32_t num_workers_;
  std::vector<float> scores_, norms_;        // [Hkv, T]
  std::vector<int32_t> budgets_;             // [Hkv]
  std::vector<int32_t> positions_, indptr_;  // of the layer that was chosen last
  std::vector<int32_t> schedules_;           // [L, schedule_size]
  std::vector<int32_t> workspace_;           // the largest that a verb asked for
};

}  // namespace embed
