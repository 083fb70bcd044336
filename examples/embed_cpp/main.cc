// embed MODEL TOKENS: reads a prompt of token ids, keeps a part of its KV cache, and writes on.
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include <omp.h>

#include "llama.h"

namespace {

using Clock = std::chrono::steady_clock;

constexpr char kUsage[] =
    "usage: embed MODEL TOKENS [--ratio R | --budget N] [--critical] [--new-tokens N]\n"
    "             [--device cpu|cuda] [--threads N] [--json FILE]\n"
    "       embed MODEL TOKENS --book FILE [...]\n"
    "  MODEL       folder with config.json and model.safetensors (float32) of a Llama\n"
    "  TOKENS      file with the token ids of the prompt\n"
    "  --ratio     share of the prompt's cache to keep (0.1)\n"
    "  --budget    instead: mean entries to keep per kv head\n"
    "  --critical  select by CriticalKV's two stages\n"
    "  --book      the prompt comes behind the text that `adakv compress --dtype float32` wrote to "
    "FILE\n"
    "  --device    where the cache lives and adakv works on it (cpu)\n";

struct Options {
  std::string model, tokens, json, book, device = "cpu";
  double ratio = 0.1;
  int32_t budget = 0;
  bool is_critical = false;
  int64_t new_tokens = 64;
  int threads = 0;
};

double number(const std::string& name, const char* text, double least) {
  char* end = nullptr;
  const double value = text ? std::strtod(text, &end) : 0;
  if (!text || end == text || *end != '\0' || value < least) {
    throw std::runtime_error(name + " must be a number of at least " + std::to_string(least));
  }
  return value;
}

Options parse(int argc, char** argv) {
  Options options;
  std::vector<std::string> names;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word.rfind("--", 0) != 0) {
      names.push_back(word);
    } else if (word == "--critical") {
      options.is_critical = true;
    } else {
      const char* value = i + 1 < argc ? argv[++i] : nullptr;
      if (word == "--ratio") {
        options.ratio = number(word, value, 0);
      } else if (word == "--budget") {
        options.budget = static_cast<int32_t>(number(word, value, 1));
      } else if (word == "--new-tokens") {
        options.new_tokens = static_cast<int64_t>(number(word, value, 1));
      } else if (word == "--threads") {
        options.threads = static_cast<int>(number(word, value, 1));
      } else if (word == "--device" || word == "--json" || word == "--book") {
        if (!value) throw std::runtime_error(word + " wants a value");
        std::string& option = word == "--json"   ? options.json
                              : word == "--book" ? options.book
                                                 : options.device;
        option = value;
      } else {
        throw std::runtime_error("unknown option " + word + "\n" + kUsage);
      }
    }
  }
  if (names.size() != 2) throw std::runtime_error(kUsage);
  if (options.ratio <= 0 || options.ratio > 1) {
    throw std::runtime_error("--ratio must be above 0 and at most 1");
  }
  options.model = names[0], options.tokens = names[1];
  return options;
}

std::vector<int32_t> read_tokens(const std::string& path) {
  std::ifstream file(path);
  std::vector<int32_t> tokens;
  for (int32_t token; file >> token;) tokens.push_back(token);
  if (!file.eof() || tokens.empty()) throw std::runtime_error(path + " must hold token ids");
  return tokens;
}

template <typename T>
std::string list(const std::vector<T>& values) {
  std::string text;
  for (const T& value : values) {
    text += text.empty() ? "" : ", ";
    if constexpr (std::is_integral_v<T>) {
      text += std::to_string(value);
    } else {
      text += list(value);
    }
  }
  return "[" + text + "]";
}

// What a prompt may keep.
embed::Policy policy_of(const Options& options, int64_t length) {
  embed::Policy policy;
  policy.is_critical = options.is_critical;
  const int32_t share = static_cast<int32_t>(std::floor(options.ratio * double(length) + 0.5));
  policy.budget = options.budget ? options.budget : std::max(policy.window + 1, share);
  if (policy.budget < policy.window) {
    throw std::runtime_error("--budget must be at least the window, " +
                             std::to_string(policy.window));
  }
  return policy;
}

// A book that was made for the model. Its weights are told by a fingerprint that Python takes of
// them, which export.py writes beside them; without it only the shape is compared.
std::unique_ptr<adakv::CacheFile> book_of(const Options& options) {
  if (options.book.empty()) return nullptr;
  auto book = std::make_unique<adakv::CacheFile>(options.book);
  std::ifstream file(options.model + "/fingerprint.txt");
  std::string fingerprint;
  if (file >> fingerprint && book->texts().at("model") != fingerprint) {
    throw std::runtime_error(options.book + " was made for another model, or for other weights");
  }
  return book;
}

// Reads the prompt, as a whole or behind a book; its first new token.
int32_t read_prompt(const std::vector<int32_t>& prompt,
                    int64_t position,
                    embed::Llama& model,
                    embed::Kv& kv) {
  const bool has_bar = isatty(2);
  int32_t next = 0;
  if (position == 0) {
    next = model.prefill(prompt, kv, [&](int64_t done) {
      if (has_bar) {
        std::fprintf(stderr, "\rprompt: layer %d of %d", int(done), int(model.config().layers));
      }
    });
  } else {
    for (const int32_t token : prompt) next = model.decode(token, position++, kv);
  }
  if (has_bar) std::fprintf(stderr, "\n");
  return next;
}

void run(const Options& options) {
  const int threads = options.threads ? options.threads : omp_get_num_procs();
  omp_set_num_threads(threads);
  adakv::set_num_threads(threads);

  const embed::Place place(options.device);
  embed::Llama model(options.model);
  const embed::Config& config = model.config();
  const std::vector<int32_t> prompt = read_tokens(options.tokens);
  const std::unique_ptr<adakv::CacheFile> book = book_of(options);
  const int64_t before = book ? book->seen()[0] : 0;
  const int64_t length = static_cast<int64_t>(prompt.size());
  const embed::Sizes sizes = {
      static_cast<int32_t>(config.layers), static_cast<int32_t>(config.heads),
      static_cast<int32_t>(config.kv_heads), static_cast<int32_t>(config.head_dim)};
  const auto kv_memory =
      book ? std::make_unique<embed::Kv>(place, sizes, *book, length + options.new_tokens)
           : std::make_unique<embed::Kv>(place, sizes, policy_of(options, length), length,
                                         options.new_tokens);
  embed::Kv& kv = *kv_memory;

  const auto start = Clock::now();
  std::vector<int32_t> tokens = {read_prompt(prompt, before, model, kv)};
  const auto prefilled = Clock::now();
  std::vector<std::vector<std::vector<int32_t>>> kept;
  for (int32_t i = 0; i < sizes.layers; ++i) kept.push_back(kv.positions(i));
  const auto decoding = Clock::now();
  while (static_cast<int64_t>(tokens.size()) < options.new_tokens) {
    tokens.push_back(
        model.decode(tokens.back(), before + length + static_cast<int64_t>(tokens.size()) - 1, kv));
  }
  const auto end = Clock::now();

  for (int32_t token : tokens) std::printf("%d ", token);
  std::printf("\n");
  const auto seconds = [](Clock::duration time) {
    return std::chrono::duration<double>(time).count();
  };
  const double ms_per_token =
      1e3 * seconds(end - decoding) / std::max<double>(1, double(tokens.size()) - 1);
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  const size_t layer_bytes = 2 * length * config.kv_heads * config.head_dim * sizeof(float);
  std::fprintf(stderr, "prefill %.2f s, %.1f ms a token, %.1f MiB at most\n",
               seconds(prefilled - start), ms_per_token, usage.ru_maxrss / 1024.);
  if (options.json.empty()) return;
  std::ofstream json(options.json);
  json << "{\"tokens\": " << list(tokens) << ",\n \"kept\": " << list(kept)
       << ",\n \"prefill_s\": " << seconds(prefilled - start)
       << ", \"ms_per_token\": " << ms_per_token << ", \"peak_bytes\": " << usage.ru_maxrss * 1024
       << ", \"weight_bytes\": " << model.weight_bytes() << ", \"cache_bytes\": " << kv.bytes()
       << ", \"layer_bytes\": " << layer_bytes << "}\n";
  if (!json.flush()) throw std::runtime_error(options.json + " can't be written");
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse(argc, argv));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "embed: %s\n", error.what());
    return 1;
  }
}
