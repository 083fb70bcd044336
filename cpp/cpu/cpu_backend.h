// The CPU backend. Each verb's body is in the file that bears its name.
#pragma once

#include "ops/backend.h"

namespace adakv {

class CpuBackend final : public Backend {
 public:
  const char* name() const override { return "cpu"; }
  Memory& memory(Device device) override;
  int default_num_workers(Device device) override;

  void score(const ScoreArgs& args) override;
  void value_norm(const ValueNormArgs& args) override;
  void allocate(const AllocateArgs& args) override;
  void select(const SelectArgs& args) override;
  void compact(const CompactArgs& args) override;
  void append(const AppendArgs& args) override;
  void fork(const ForkArgs& args) override;
  void plan(const PlanArgs& args) override;
  void attend(const AttendArgs& args) override;
  void shortlist(const ShortlistArgs& args) override;

  size_t workspace_bytes(const ScoreArgs& args) const override;
  size_t workspace_bytes(const ValueNormArgs& args) const override;
  size_t workspace_bytes(const AllocateArgs& args) const override;
  size_t workspace_bytes(const SelectArgs& args) const override;
  size_t workspace_bytes(const CompactArgs& args) const override;
  size_t workspace_bytes(const AttendArgs& args) const override;
  size_t workspace_bytes(const ShortlistArgs& args) const override;
};

/// compact without keys and values (compact_in_place.cc).
void cpu_compact_in_place(const CompactArgs& args);

}  // namespace adakv
