// A safetensors file: named tensors and texts beside them, mapped and not copied. Caches are kept in
// such files (cache_file.h), and so are the weights of most models.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <string>
#include <string_view>

#include "adakv/types.h"

#pragma GCC visibility push(default)  // what a shared adakv shows
namespace adakv {

/// What a file holds. Nothing that it says is believed before it was checked: names are unique,
/// tensors lie one behind the other and fill the file, each aligned to the size of its elements.
class SafeTensors {
 public:
  /// Maps a file, which nobody may write to or cut as long as this object lives. Throws Error if it
  /// can't be read or is none, and if it has a tensor of a dtype that DType doesn't have (F32, F16,
  /// BF16, I32, U8), of more than four dimensions, or with one of 2^31 and more.
  explicit SafeTensors(const std::string& path);

  /// A file whose bytes are in memory; `data` must outlive this object. Throws as the other one does.
  SafeTensors(const void* data, size_t bytes);

  /// What messages call it.
  const std::string& name() const { return name_; }

  /// Texts beside the tensors, by name (`__metadata__`).
  const std::map<std::string, std::string>& texts() const { return texts_; }

  /// The tensors by name, contiguous in host memory. They must not be written to.
  const std::map<std::string, TensorView>& tensors() const { return tensors_; }

  /// One of them; a view of rank -1 if there is none of that name.
  TensorView tensor(const std::string& name) const;

  /// All that stands before the tensors.
  std::string_view head() const { return head_; }

 private:
  void read();

  std::string name_;
  std::shared_ptr<const void> map_;  // null for memory of somebody else
  std::string_view file_, head_;
  std::map<std::string, std::string> texts_;
  std::map<std::string, TensorView> tensors_;
};

}  // namespace adakv
#pragma GCC visibility pop
