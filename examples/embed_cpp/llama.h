// A Llama: reads a folder as transformers writes it, a prompt at once and then token by token.
#pragma once

#include <adakv/adakv.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kv.h"

namespace embed {

struct Config {
  int64_t layers, width, inner_width, heads, kv_heads, head_dim, vocabulary;
  float eps;  // of the norms
  double rope_theta;

  /// From config.json. Throws std::runtime_error for what this runtime can't do.
  static Config read(const std::string& path);
};

class Llama {
 public:
  /// config.json and model.safetensors (float32) in `folder`.
  explicit Llama(const std::string& folder);

  const Config& config() const { return config_; }
  size_t weight_bytes() const;

  /// Reads a prompt into `kv`; the most likely next token. `progress` hears of every layer done.
  int32_t prefill(const std::vector<int32_t>& tokens,
                  Kv& kv,
                  const std::function<void(int64_t)>& progress);

  /// Reads one more token, which stands at `position`; the most likely next one.
  int32_t decode(int32_t token, int64_t position, Kv& kv);

 private:
  struct Layer {
    const float *attention_norm, *w_q, *w_k, *w_v, *w_o, *mlp_norm, *w_gate, *w_up, *w_down;
  };

  void embed(const int32_t* tokens, int64_t count, float* x) const;
  void project(const Layer& layer,
               const float* x,
               int64_t rows,
               int64_t position,
               float* q,
               float* k,
               float* v);
  void mlp(const Layer& layer, float* x, int64_t rows);
  int32_t next_token(const float* x);

  Config config_;
  adakv::SafeTensors file_;
  std::vector<Layer> layers_;
  const float *embedding_, *norm_, *head_;
  std::vector<float> frequencies_;         // [D / 2] of RoPE
  std::vector<float> normed_, gate_, up_;  // of the rows that are being computed
  std::vector<float> logits_;              // [vocabulary]
};

}  // namespace embed
