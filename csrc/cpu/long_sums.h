// Sums of many numbers as good as in twice the precision. Included once per instruction set.

// A sum and what its roundings lost (Knuth's TwoSum); T: a number or a vector of them.
template <typename T>
struct Sum {
  T value = {}, lost = {};
  inline __attribute__((always_inline)) void add(T x) {
    const T total = value + x, added = total - value;
    lost += (value - (total - added)) + (x - added);
    value = total;
  }
};
