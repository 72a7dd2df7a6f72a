// csrc/cuda/accept_drafts.cu on the CPU against the definition in plain loops. Usage:
//   accept_drafts greedy ROWS MOST SEED
//   accept_drafts drawn|certain ROWS MOST WORDS SEED    exit status 1 and a message if wrong
// As a shared library it launches for tests/cuda_programs.py.
#include "cuda_on_cpu.h"
#ifndef SOURCE
#define SOURCE "../../csrc/cuda/accept_drafts.cu"
#endif
#include SOURCE

#include <cstdio>
#include <cstdlib>

namespace {

int wrong(const char* what, int row, long long found, long long expected) {
  std::printf("wrong %s at row %d: %lld instead of %lld\n", what, row, found, expected);
  return 1;
}

struct Answer {
  std::vector<int> accepted;
  std::vector<long long> token;

  explicit Answer(int rows) : accepted(rows, -7), token(rows, -7) {}
};

// One entry more than rows each, which must stay as it is.
int compare(const Answer& found, const Answer& expected, int rows) {
  for (int row = 0; row <= rows; ++row) {
    const bool behind = row == rows;
    const int kept = behind ? -7 : expected.accepted[row];
    const long long token = behind ? -7 : expected.token[row];
    if (found.accepted[row] != kept) return wrong("accepted", row, found.accepted[row], kept);
    if (found.token[row] != token) return wrong("token", row, found.token[row], token);
  }
  return 0;
}

std::vector<int> lengths_of(int rows, int most, std::mt19937& random) {
  std::vector<int> lengths(rows);
  for (int& length : lengths) length = static_cast<int>(random() % (most + 1));
  // A device looks at no values: what is out of range is clamped.
  if (rows > 3) lengths[1] = most + 5, lengths[2] = -2;
  return lengths;
}

int check_greedy(int rows, int most, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<long long> choices(static_cast<std::size_t>(rows) * (most + 1)),
      drafts(static_cast<std::size_t>(rows) * most);
  for (auto& choice : choices) choice = static_cast<long long>(random() % 3) + (1ll << 40);
  const std::vector<int> lengths = lengths_of(rows, most, random);
  // Row 1 asks for more drafts than there are: what lies behind them would look right.
  if (rows > 3) choices[2 * (most + 1)] = choices[most + 1 + most];
  Answer found(rows + 1), expected(rows);
  for (int row = 0; row < rows; ++row) {
    const long long* own = choices.data() + static_cast<std::size_t>(row) * (most + 1);
    const int agree = row == 1 || row == 2 ? most : static_cast<int>(random() % (most + 1));
    for (int i = 0; i < most; ++i) drafts[static_cast<std::size_t>(row) * most + i] = own[i] + (i == agree);
    expected.accepted[row] = std::min(agree, std::clamp(lengths[row], 0, most));
    expected.token[row] = own[expected.accepted[row]];
  }
  cuda_on_cpu::launch(accept_drafts_greedy, rows, 32, seed, drafts.data(), lengths.data(), choices.data(), most,
                      found.accepted.data(), found.token.data());
  return compare(found, expected, rows);
}

// Distributions, `place` floats apart, at an address that is a multiple of nothing but a float.
struct Distributions {
  std::vector<float> memory;
  long long row, place;

  Distributions(int rows, int places, int words, std::mt19937& random)
      : row((words + 3) * places + 5), place(words + 3) {
    memory.assign(1 + rows * row, 1.f);  // what lies between would be accepted
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < places; ++i) {
        double sum = 0;
        for (int word = 0; word < words; ++word) sum += *at(r, i, word) = random() % 4 ? random() % 1000 : 0;
        for (int word = 0; word < words; ++word) *at(r, i, word) /= static_cast<float>(sum);  // NaN where all is 0
      }
  }
  float* at(int r, int i, int word) { return memory.data() + 1 + r * row + i * place + word; }
};

unsigned long long units(float x) { return x > 0 ? static_cast<unsigned long long>(std::min(x, 1.f) * 0x1p60f) : 0; }

long long first_past(const std::vector<unsigned long long>& mass, float uniform) {
  unsigned long long total = 0, running = 0;
  for (const auto each : mass) total += each;
  if (total == 0) return -1;
  const auto threshold = static_cast<unsigned long long>(static_cast<double>(uniform) * static_cast<double>(total));
  for (std::size_t word = 0;; ++word)
    if ((running += mass[word]) > threshold) return static_cast<long long>(word);
}

// Rows that chance would not make.
void make_special(bool certain, int most, int words, Distributions& p, Distributions& q, std::vector<int>& lengths,
                  std::vector<long long>& drafts, std::vector<float>& uniforms) {
  const auto last = [&](int row) -> float& { return uniforms[static_cast<std::size_t>(row) * (most + 1) + most]; };
  for (int i = 0; i <= most; ++i) {
    if (words > 1) *p.at(3, i, 0) = 0;  // no mass: not even the smallest uniform draws it
    *p.at(6, i, words / 2) = 3;         // counts as 1
  }
  last(3) = 0;
  last(6) = 0.8f;
  last(8) = 1;  // clamped: the last word with mass
  if (most == 0) return;
  for (const int row : {4, 5, 7, 9}) lengths[row] = most;
  drafts[4 * most] = -1, drafts[5 * most] = words;  // refused, and nothing is taken from p
  uniforms[4 * (most + 1)] = uniforms[5 * (most + 1)] = 0.5f;
  // Refused by a difference that has no mass: drawn from p after all.
  for (int word = 0; word < words; ++word) *p.at(7, 0, word) = *q.at(7, 0, word) = 0;
  *p.at(7, 0, static_cast<int>(drafts[7 * most])) = uniforms[7 * (most + 1)] = 1 - 0x1p-24f;
  *q.at(7, 0, static_cast<int>(drafts[7 * most])) = 1;
  // Kept by a quarter of a last place, which a product rounded to float loses.
  const int draft = static_cast<int>(drafts[9 * most]);
  uniforms[9 * (most + 1)] = 0.75f, *q.at(9, 0, draft) = 12582913 * 0x1p-24f, *p.at(9, 0, draft) = 9437185 * 0x1p-24f;
  if (certain) *p.at(9, 0, draft) = 0.75f;  // and an equal one is refused
}

int check_sampled(bool certain, int rows, int most, int words, unsigned seed) {
  std::mt19937 random(seed);
  Distributions p(rows, most + 1, words, random), q(rows, most, words, random);
  std::vector<int> lengths = lengths_of(rows, most, random);
  std::vector<long long> drafts(static_cast<std::size_t>(rows) * most);
  std::vector<float> uniforms(static_cast<std::size_t>(rows) * (most + 1));
  for (auto& draft : drafts) draft = random() % words;
  for (auto& uniform : uniforms) uniform = static_cast<float>(random() >> 8) * 0x1p-24f;
  if (rows > 9) make_special(certain, most, words, p, q, lengths, drafts, uniforms);
  Answer found(rows + 1), expected(rows);
  for (int row = 0; row < rows; ++row) {
    const int length = std::clamp(lengths[row], 0, most);
    const float* uniform = uniforms.data() + static_cast<std::size_t>(row) * (most + 1);
    int kept = 0;
    long long draft = -1;
    for (; kept < length; ++kept) {
      draft = drafts[static_cast<std::size_t>(row) * most + kept];
      if (draft < 0 || draft >= words) break;
      const double share = certain ? 1 : *q.at(row, kept, draft);
      if (!(uniform[kept] * share < *p.at(row, kept, draft))) break;
    }
    std::vector<unsigned long long> whole(words), residual(words);
    for (int word = 0; word < words; ++word) {
      const float own = *p.at(row, kept, word);
      whole[word] = units(own);
      residual[word] = kept == length ? 0
                       : certain      ? (word == draft ? 0 : units(own))
                                      : units(own - *q.at(row, kept, word));
    }
    const float last = std::min(uniform[most], 1 - 0x1p-24f);
    const long long drawn = first_past(residual, last);
    expected.accepted[row] = kept;
    expected.token[row] = drawn < 0 ? first_past(whole, last) : drawn;
  }
  cuda_on_cpu::launch(accept_drafts_sampled, rows, 32 * kWarps, seed, drafts.data(), lengths.data(), p.at(0, 0, 0),
                      p.row, p.place, certain ? nullptr : q.at(0, 0, 0), q.row, q.place, uniforms.data(), most, words,
                      found.accepted.data(), found.token.data());
  return compare(found, expected, rows);
}

}  // namespace

CUDA_ON_CPU_LIBRARY(NamedKernel("accept_drafts_greedy", accept_drafts_greedy),
                    NamedKernel("accept_drafts_sampled", accept_drafts_sampled))

int main(int count, char** arguments) {
  const std::string kind = count > 1 ? arguments[1] : "";
  const auto number = [&](int at) { return std::atoi(arguments[at]); };
  try {
    if (kind == "greedy" && count == 5) return check_greedy(number(2), number(3), number(4));
    if ((kind == "drawn" || kind == "certain") && count == 6)
      return check_sampled(kind == "certain", number(2), number(3), number(4), number(5));
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  return 2;
}
