// score for any head dim, dtype and option: its sizes, and the way to the kernels (any.cuh), each dtype
// of which is compiled by itself (instantiate/).
#include "score/any.cuh"

namespace adakv {

extern template void launch_any_score<float>(const ScoreArgs&, const ScoreParams&);
extern template void launch_any_score<__half>(const ScoreArgs&, const ScoreParams&);
extern template void launch_any_score<__nv_bfloat16>(const ScoreArgs&, const ScoreParams&);

ScoreSizes any_score_sizes(const ScoreArgs& args) {
  ScoreSizes sizes = {};
  dispatch_dtype(args.keys.dtype, [&](auto element) {
    using Element = typename decltype(element)::type;
    dispatch_tile_dim(args.keys.shape[3], [&](auto dim) {
      using Tile = ScoreTile<Element, dim.value>;
      sizes = {Tile::kRows, Tile::kUnit, Tile::kEntries, Tile::kCtas, 1, false};
    });
  });
  return sizes;
}

void any_score(const ScoreArgs& args, const ScoreParams& params) {
  dispatch_dtype(args.keys.dtype, [&](auto element) {
    launch_any_score<typename decltype(element)::type>(args, params);
  });
}

}  // namespace adakv
