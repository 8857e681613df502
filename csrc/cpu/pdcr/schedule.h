// The order in which threads take PDCR's tile pairs. Tested by tests/test_pdcr.py, which compares the bits of different
// numbers of threads.
//
// The pairs of groups of blocks are ordered like a round-robin tournament: threads take them in order, and seldom want
// the same block. A task waits until its groups have had all their earlier tasks. So there are no copies and no atomic
// adds, and the bits are equal for any number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/pdcr/image.h"

namespace csf::pdcr {

// A pair of groups (by their first blocks, a <= b) of an image, and how many tasks must have touched each before.
struct Task {
  int32_t image;
  int32_t a, b;
  int32_t turn_a, turn_b;
};

// Blocks in a group: two where an image has enough of them, which halves what comes from beyond the L2 cache.
template <class T>
int64_t group_size(const Image<T>& image) {
  return image.blocks() >= 32 ? 2 : 1;
}

// Blocks of all images.
template <class T>
int64_t total_blocks(const std::vector<Image<T>>& images) {
  return images.empty() ? 0 : images.back().first_block + images.back().blocks();
}

// Calls pair(a, b) for the pairs of blocks of two groups (given by their first blocks) that are not skipped.
template <class T, class Pair>
void for_each_block_pair(const Image<T>& image, int64_t group_a, int64_t group_b, const Pair& pair) {
  const int64_t size = group_size(image);
  for (int64_t a = group_a; a < std::min(group_a + size, image.blocks()); ++a) {
    for (int64_t b = std::max(a, group_b); b < std::min(group_b + size, image.blocks()); ++b) {
      if (!image.skips(a, b)) pair(a, b);
    }
  }
}

// The pairs of groups in tournament order (the circle method), all images round by round.
template <class T>
std::vector<Task> make_schedule(const std::vector<Image<T>>& images) {
  std::vector<Task> tasks;
  std::vector<int32_t> turns(total_blocks(images), 0);  // by the first block of a group
  const auto players = [](const Image<T>& image) {
    return round_up(divide_up(image.blocks(), group_size(image)), 2);
  };
  const auto add = [&](int64_t index, int64_t group_a, int64_t group_b) {
    const Image<T>& image = images[index];
    const int64_t a = std::min(group_a, group_b) * group_size(image);
    const int64_t b = std::max(group_a, group_b) * group_size(image);
    bool any = false;
    for_each_block_pair(image, a, b, [&](int64_t, int64_t) { any = true; });
    if (!any) return;
    int32_t& turn_a = turns[image.first_block + a];
    int32_t& turn_b = turns[image.first_block + b];
    tasks.push_back({int32_t(index), int32_t(a), int32_t(b), turn_a, turn_b});
    ++turn_a;
    if (a != b) ++turn_b;
  };
  int64_t rounds = 0;
  for (const Image<T>& image : images) rounds = std::max(rounds, players(image));
  for (int64_t round = 0; round < rounds; ++round) {
    for (int64_t index = 0; index < int64_t(images.size()); ++index) {
      const Image<T>& image = images[index];
      const int64_t circle = players(image) - 1;
      // With an odd number of groups one has no partner in each round: its pairs within fill the gap.
      const bool odd = circle * group_size(image) >= image.blocks();
      if (round > circle) continue;
      if (round == circle) {
        for (int64_t group = 0; group <= circle && !odd; ++group) add(index, group, group);
        continue;
      }
      add(index, round, odd ? round : circle);
      for (int64_t k = 1; k <= circle / 2; ++k) add(index, (round + k) % circle, (round + circle - k) % circle);
    }
  }
  return tasks;
}

// Runs pair(image, a, b) for every pair of blocks that is not skipped; each thread's `pair` comes from make_pair().
template <class T, class MakePair>
void for_each_tile(const std::vector<Image<T>>& images, const MakePair& make_pair) {
  const std::vector<Task> tasks = make_schedule(images);
  std::vector<std::atomic<int32_t>> turns(total_blocks(images));  // by the first block of a group
  std::atomic<int64_t> next{0};
  const auto wait = [&](int64_t group, int32_t turn) {
    for (int spins = 0; turns[group].load(std::memory_order_acquire) < turn; ++spins) {
      if (spins > 1024) std::this_thread::yield();
    }
  };
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), tasks.size());
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    auto pair = make_pair();
    for (int64_t index; (index = next.fetch_add(1, std::memory_order_relaxed)) < int64_t(tasks.size());) {
      const Task& task = tasks[index];
      const Image<T>& image = images[task.image];
      wait(image.first_block + task.a, task.turn_a);
      wait(image.first_block + task.b, task.turn_b);
      for_each_block_pair(image, task.a, task.b, [&](int64_t a, int64_t b) { pair(image, a, b); });
      turns[image.first_block + task.a].fetch_add(1, std::memory_order_release);
      if (task.a != task.b) turns[image.first_block + task.b].fetch_add(1, std::memory_order_release);
    }
  });
}

}  // namespace csf::pdcr
