#include "llama.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <initializer_list>
#include <sstream>
#include <stdexcept>

#include "json.h"
#include "matrix.h"

namespace embed {
namespace {

constexpr int64_t kChunk = 512;  // tokens of a prompt that go through a layer's products at a time

void check(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error(message);
}

// The numbers of a weight, which stay in the pages of the file.
const float* weight(const adakv::SafeTensors& file,
                    const std::string& name,
                    std::initializer_list<int64_t> shape) {
  const adakv::TensorView found = file.tensor(name);
  const adakv::TensorView expected(nullptr, shape, adakv::DType::kFloat32);
  check(bool(found), "no tensor " + name);
  check(found.dtype == expected.dtype, name + " must be float32");
  check(found.shape_string() == expected.shape_string(),
        name + " must be " + expected.shape_string() + ", got " + found.shape_string());
  return found.ptr<float>();
}

}  // namespace

Config Config::read(const std::string& path) {
  std::ifstream file(path);
  check(file.good(), path + " can't be read");
  std::stringstream text;
  text << file.rdbuf();
  const Json json = Json::parse(text.str());
  const auto number = [&](const char* name) {
    check(!json[name].is_null(), path + ": " + name + " is missing");
    return json[name].as_number(name);
  };
  const auto is_set = [&](const char* name) {
    return !json[name].is_null() && json[name].as_number(name) != 0;
  };
  check(json["model_type"].string == "llama",
        path + ": model_type must be llama, got " + json["model_type"].string);
  check(json["hidden_act"].string == "silu", path + ": hidden_act must be silu");
  check(!is_set("attention_bias") && !is_set("mlp_bias"), path + ": biases are not supported");
  // transformers 4 writes rope_theta and rope_scaling, 5 writes rope_parameters.
  const Json& rope = json["rope_parameters"].is_null() ? json : json["rope_parameters"];
  check(json["rope_scaling"].is_null() &&
            (rope["rope_type"].is_null() || rope["rope_type"].string == "default"),
        path + ": scaled RoPE is not supported");

  Config config;
  config.layers = static_cast<int64_t>(number("num_hidden_layers"));
  config.width = static_cast<int64_t>(number("hidden_size"));
  config.inner_width = static_cast<int64_t>(number("intermediate_size"));
  config.heads = static_cast<int64_t>(number("num_attention_heads"));
  config.kv_heads = static_cast<int64_t>(number("num_key_value_heads"));
  config.head_dim = json["head_dim"].is_null() ? config.width / config.heads
                                               : static_cast<int64_t>(number("head_dim"));
  config.vocabulary = static_cast<int64_t>(number("vocab_size"));
  config.eps = static_cast<float>(number("rms_norm_eps"));
  config.rope_theta = rope["rope_theta"].is_null() ? 10000 : rope["rope_theta"].as_number("rope");
  return config;
}

Llama::Llama(const std::string& folder)
    : config_(Config::read(folder + "/config.json")), file_(folder + "/model.safetensors") {
  const Config& c = config_;
  const int64_t q_width = c.heads * c.head_dim, kv_width = c.kv_heads * c.head_dim;
  for (int64_t i = 0; i < c.layers; ++i) {
    const std::string name = "model.layers." + std::to_string(i) + ".";
    const auto get = [&](const char* part, std::initializer_list<int64_t> shape) {
      return weight(file_, name + part + ".weight", shape);
    };
    layers_.push_back(
        {get("input_layernorm", {c.width}), get("self_attn.q_proj", {q_width, c.width}),
         get("self_attn.k_proj", {kv_width, c.width}), get("self_attn.v_proj", {kv_width, c.width}),
         get("self_attn.o_proj", {c.width, q_width}), get("post_attention_layernorm", {c.width}),
         get("mlp.gate_proj", {c.inner_width, c.width}),
         get("mlp.up_proj", {c.inner_width, c.width}),
         get("mlp.down_proj", {c.width, c.inner_width})});
  }
  embedding_ = weight(file_, "model.embed_tokens.weight", {c.vocabulary, c.width});
  norm_ = weight(file_, "model.norm.weight", {c.width});
  const bool is_tied = !file_.tensor("lm_head.weight");
  head_ = is_tied ? embedding_ : weight(file_, "lm_head.weight", {c.vocabulary, c.width});
  logits_.resize(c.vocabulary);
  // In float32 and in this order, as transformers computes them: at position 4000 one unit in the
  // last place turns a head by a thousandth of a degree and more.
  for (int64_t i = 0; i < c.head_dim; i += 2) {
    const float exponent = static_cast<float>(i) / static_cast<float>(c.head_dim);
    frequencies_.push_back(1.f / std::pow(static_cast<float>(c.rope_theta), exponent));
  }
}

size_t Llama::weight_bytes() const {
  size_t bytes = 0;
  for (const auto& [name, view] : file_.tensors()) bytes += view.size() * sizeof(float);
  return bytes;
}

void Llama::embed(const int32_t* tokens, int64_t count, float* x) const {
  for (int64_t t = 0; t < count; ++t) {
    check(tokens[t] >= 0 && tokens[t] < config_.vocabulary,
          "tokens must be 0 to " + std::to_string(config_.vocabulary - 1) + ", got " +
              std::to_string(tokens[t]));
    std::copy_n(embedding_ + tokens[t] * config_.width, config_.width, x + t * config_.width);
  }
}

// q [rows, Hq * D], k and v [rows, Hkv * D] of x [rows, E], whose first row is at `position`.
void Llama::project(const Layer& layer,
                    const float* x,
                    int64_t rows,
                    int64_t position,
                    float* q,
                    float* k,
                    float* v) {
  const Config& c = config_;
  const int64_t q_width = c.heads * c.head_dim, kv_width = c.kv_heads * c.head_dim;
  normed_.resize(std::max<size_t>(normed_.size(), rows * c.width));
  rms_norm(x, layer.attention_norm, rows, c.width, c.eps, normed_.data());
  const Matrix normed(normed_.data(), rows, c.width);
  matmul(normed, layer.w_q, {q, rows, q_width});
  matmul(normed, layer.w_k, {k, rows, kv_width});
  matmul(normed, layer.w_v, {v, rows, kv_width});
  rope(q, rows, c.heads, c.head_dim, position, frequencies_.data());
  rope(k, rows, c.kv_heads, c.head_dim, position, frequencies_.data());
}

// x [rows, E] += down(silu(gate(norm(x))) * up(norm(x)))
void Llama::mlp(const Layer& layer, float* x, int64_t rows) {
  const Config& c = config_;
  gate_.resize(std::max<size_t>(gate_.size(), rows * c.inner_width));
  up_.resize(gate_.size());
  rms_norm(x, layer.mlp_norm, rows, c.width, c.eps, normed_.data());
  const Matrix normed(normed_.data(), rows, c.width);
  const Matrix gate(gate_.data(), rows, c.inner_width);
  matmul(normed, layer.w_gate, gate);
  matmul(normed, layer.w_up, {up_.data(), rows, c.inner_width});
  silu_times(gate_.data(), up_.data(), rows * c.inner_width);
  matmul(gate, layer.w_down, {x, rows, c.width}, true);
}

int32_t Llama::next_token(const float* x) {
  rms_norm(x, norm_, 1, config_.width, config_.eps, normed_.data());
  matmul({normed_.data(), 1, config_.width}, head_, {logits_.data(), 1, config_.vocabulary});
  return static_cast<int32_t>(std::max_element(logits_.begin(), logits_.end()) - logits_.begin());
}

int32_t Llama::prefill(const std::vector<int32_t>& tokens,
                       Kv& kv,
                       const std::function<void(int64_t)>& progress) {
  const Config& c = config_;
  const int64_t count = static_cast<int64_t>(tokens.size());
  const int64_t q_width = c.heads * c.head_dim, kv_width = c.kv_heads * c.head_dim;
  std::vector<float> x(count * c.width), q(count * q_width), k(count * kv_width), v(k.size());
  embed(tokens.data(), count, x.data());
  for (int64_t i = 0; i < c.layers; ++i) {
    const Layer& layer = layers_[i];
    for (int64_t t = 0; t < count; t += kChunk) {
      project(layer, &x[t * c.width], std::min(kChunk, count - t), t, &q[t * q_width],
              &k[t * kv_width], &v[t * kv_width]);
    }
    // Before the attention of the prompt, which puts its result in the place of q.
    kv.take_prompt(static_cast<int32_t>(i), q.data(), k.data(), v.data(), layer.w_o, c.width);
    attend_prompt(q.data(), k.data(), v.data(), count, c.heads, c.kv_heads, c.head_dim);
    for (int64_t t = 0; t < count; t += kChunk) {
      const int64_t rows = std::min(kChunk, count - t);
      matmul({&q[t * q_width], rows, q_width}, layer.w_o, {&x[t * c.width], rows, c.width}, true);
      mlp(layer, &x[t * c.width], rows);
    }
    progress(i + 1);
  }
  return next_token(&x[(count - 1) * c.width]);
}

int32_t Llama::decode(int32_t token, int64_t position, Kv& kv) {
  const Config& c = config_;
  const int64_t q_width = c.heads * c.head_dim, kv_width = c.kv_heads * c.head_dim;
  std::vector<float> x(c.width), q(q_width), k(kv_width), v(kv_width), out(q_width);
  embed(&token, 1, x.data());
  kv.begin_step();
  for (int64_t i = 0; i < c.layers; ++i) {
    project(layers_[i], x.data(), 1, position, q.data(), k.data(), v.data());
    kv.attend(static_cast<int32_t>(i), q.data(), k.data(), v.data(), out.data());
    matmul({out.data(), 1, q_width}, layers_[i].w_o, {x.data(), 1, c.width}, true);
    mlp(layers_[i], x.data(), 1);
  }
  return next_token(x.data());
}

}  // namespace embed
