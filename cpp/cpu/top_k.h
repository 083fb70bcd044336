// The k best of some lists of keys without sorting: the key of the last one that gets in is found
// digit by digit from histograms (11 + 11 + 10 bits). Only keys that share the digits found so far
// are looked at again, so a list is read once, and a second time to collect the few that do.
//
// Keys come from a callable `fill(list, begin, count, keys)` that writes keys begin .. begin +
// count of a list into `keys`; made in blocks, they never take memory of their own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace adakv::top_k {

constexpr int kBlock = 512;

/// Where the k best of several lists end. An entry above `key` is in, one below is out; of those
/// equal to `key` some are in.
struct Cutoff {
  uint32_t key = 0;
  std::vector<int32_t> above;              // [lists]  entries of the list above `key`
  std::vector<std::vector<int32_t>> ties;  // [lists]  positions of those equal to it, ascending
};

/// Calls visit(begin, count, keys) for the blocks of a list.
template <typename Fill, typename Visit>
void for_each_block(int list, int32_t length, const Fill& fill, const Visit& visit) {
  uint32_t keys[kBlock];
  for (int32_t begin = 0; begin < length; begin += kBlock) {
    const int32_t count = std::min(kBlock, length - begin);
    fill(list, begin, count, keys);
    visit(begin, count, keys);
  }
}

namespace detail {

struct Candidate {
  uint32_t key;
  int32_t position;
};

/// The highest digit d for which the lists have k entries that are above or have a digit >= d, if
/// each counts for at least `own`. Entries with higher digits are added to `above`.
inline uint32_t find_digit(const std::vector<int32_t>& histograms,  // [digits, lists]
                           std::vector<int32_t>& above,             // [lists]
                           int32_t own,
                           int64_t k) {
  const int lists = static_cast<int>(above.size());
  for (int64_t digit = static_cast<int64_t>(histograms.size()) / lists - 1; digit > 0; --digit) {
    const int32_t* counts = &histograms[digit * lists];
    int64_t total = 0;
    for (int i = 0; i < lists; ++i) total += std::max(own, above[i] + counts[i]);
    if (total >= k) return static_cast<uint32_t>(digit);
    for (int i = 0; i < lists; ++i) above[i] += counts[i];
  }
  return 0;
}

}  // namespace detail

/// Finds the highest key with which `lists` lists of `length` keys have k entries that reach it, if
/// each list counts for at least `own` (<= length) entries. 1 <= k <= lists * length.
template <typename Fill>
Cutoff find_cutoff(int lists, int32_t length, int32_t own, int64_t k, const Fill& fill) {
  using detail::Candidate;
  constexpr int kShifts[] = {21, 10, 0}, kBits[] = {11, 11, 10};
  Cutoff cutoff;
  cutoff.above.assign(lists, 0);
  cutoff.ties.resize(lists);
  std::vector<int32_t> histograms;  // [digits, lists]

  histograms.assign(static_cast<size_t>(lists) << kBits[0], 0);
  for (int i = 0; i < lists; ++i) {
    for_each_block(i, length, fill, [&](int32_t, int32_t count, const uint32_t* keys) {
      for (int32_t j = 0; j < count; ++j) ++histograms[(keys[j] >> kShifts[0]) * lists + i];
    });
  }
  uint32_t digit = detail::find_digit(histograms, cutoff.above, own, k);
  cutoff.key = digit << kShifts[0];

  std::vector<std::vector<Candidate>> candidates(lists);
  for (int i = 0; i < lists; ++i) {
    size_t size = 0;
    candidates[i].resize(histograms[digit * lists + i] + 1);  // one more: every key is written
    for_each_block(i, length, fill, [&](int32_t begin, int32_t count, const uint32_t* keys) {
      Candidate* out = candidates[i].data();
      for (int32_t j = 0; j < count; ++j) {
        out[size] = {keys[j], begin + j};
        size += keys[j] >> kShifts[0] == digit;
      }
    });
    candidates[i].resize(size);
  }

  for (int level = 1; level < 3; ++level) {
    const uint32_t mask = (1u << kBits[level]) - 1;
    const auto digit_of = [&](Candidate c) { return c.key >> kShifts[level] & mask; };
    histograms.assign(static_cast<size_t>(lists) << kBits[level], 0);
    for (int i = 0; i < lists; ++i) {
      for (const Candidate c : candidates[i]) ++histograms[digit_of(c) * lists + i];
    }
    digit = detail::find_digit(histograms, cutoff.above, own, k);
    cutoff.key |= digit << kShifts[level];
    for (std::vector<Candidate>& list : candidates) {
      list.erase(std::remove_if(list.begin(), list.end(),
                                [&](Candidate c) { return digit_of(c) != digit; }),
                 list.end());
    }
  }
  for (int i = 0; i < lists; ++i) {
    for (const Candidate c : candidates[i]) cutoff.ties[i].push_back(c.position);
  }
  return cutoff;
}

}  // namespace adakv::top_k
