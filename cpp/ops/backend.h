// One backend holds the ten bodies for one device type. The front door (ops.cc) has checked every
// argument before a body runs, so bodies check nothing, allocate nothing and keep no state.
#pragma once

#include "adakv/ops.h"

namespace adakv {

class Backend {
 public:
  virtual ~Backend() = default;

  virtual const char* name() const = 0;
  virtual Memory& memory(Device device) = 0;
  virtual int default_num_workers(Device device) = 0;

  virtual void score(const ScoreArgs& args) = 0;
  virtual void value_norm(const ValueNormArgs& args) = 0;
  virtual void allocate(const AllocateArgs& args) = 0;
  virtual void select(const SelectArgs& args) = 0;
  virtual void compact(const CompactArgs& args) = 0;
  virtual void append(const AppendArgs& args) = 0;
  virtual void fork(const ForkArgs& args) = 0;
  virtual void plan(const PlanArgs& args) = 0;
  virtual void attend(const AttendArgs& args) = 0;
  virtual void shortlist(const ShortlistArgs& args) = 0;

  virtual size_t workspace_bytes(const ScoreArgs& args) const = 0;
  virtual size_t workspace_bytes(const ValueNormArgs& args) const = 0;
  virtual size_t workspace_bytes(const AllocateArgs& args) const = 0;
  virtual size_t workspace_bytes(const SelectArgs& args) const = 0;
  virtual size_t workspace_bytes(const CompactArgs& args) const = 0;
  virtual size_t workspace_bytes(const AttendArgs& args) const = 0;
  virtual size_t workspace_bytes(const ShortlistArgs& args) const = 0;
};

/// The backend of a device type. Throws Error if it was not built, or finds no device (and says
/// why).
Backend& backend(DeviceType type);

/// The two backends; cuda_backend() is null in a build without CUDA.
Backend& cpu_backend();
Backend* cuda_backend();

}  // namespace adakv
