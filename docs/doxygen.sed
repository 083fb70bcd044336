# Members carry plain comments behind them; for Doxygen those are documentation.
s#([;,]) +// #\1  ///< #
s#([;,0-9]) +/\* #\1  /**< #
