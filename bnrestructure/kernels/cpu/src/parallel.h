// Threads and scratch memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

namespace bnr {

// f(t) for t in [0, threads), one share of the work each. The shares are those that were asked for even if OpenMP grants
// fewer threads (inside another parallel region, say), so results depend on `threads` alone.
template <class F>
inline void parallel(int64_t threads, F&& f) {
    if (threads <= 1) {
        f(int64_t(0));
        return;
    }
#pragma omp parallel for num_threads(int(threads)) schedule(static, 1)
    for (int64_t t = 0; t < threads; t++) f(t);
}

struct Range {
    int64_t begin, end;
    int64_t size() const { return end - begin; }
};

// Share t of [0, n) in `threads` contiguous parts, cut at multiples of `grain`.
inline Range share(int64_t n, int64_t grain, int64_t t, int64_t threads) {
    const int64_t units = (n + grain - 1) / grain;
    return {std::min(n, units * t / threads * grain), std::min(n, units * (t + 1) / threads * grain)};
}

// How many threads `work` (elements touched) is worth, at most `available`.
inline int64_t useful_threads(int64_t work, int64_t available) {
    constexpr int64_t least = 8192;  // below this, waking a thread costs more than it saves
    return std::max<int64_t>(1, std::min(available, work / least));
}

// A frame of this thread's scratch memory: what it hands out lives as long as the frame, is aligned to a cache line and
// uninitialised. Frames nest. The memory is kept for the thread's next call, so steady state allocates nothing.
class Scratch {
  public:
    Scratch() : arena_(arena()), block_(arena_.block), used_(arena_.used) {}
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() {
        arena_.block = block_;
        arena_.used = used_;
        if (block_ == 0 && used_ == 0) arena_.merge();
    }

    template <class T>
    T* take(int64_t n) {
        T* p = reinterpret_cast<T*>(arena_.take((size_t(n) * sizeof(T) + 63) / 64 * 64));
#ifdef BNR_POISON
        std::memset(static_cast<void*>(p), 0xff, size_t(n) * sizeof(T));  // NaNs: reading what nobody wrote shows
#endif
        return p;
    }

    template <class T>
    T* zeros(int64_t n) {
        T* p = take<T>(n);
        std::memset(static_cast<void*>(p), 0, size_t(n) * sizeof(T));
        return p;
    }

  private:
    struct Free {
        void operator()(char* p) const { std::free(p); }
    };
    struct Block {
        std::unique_ptr<char, Free> memory;
        size_t size;
    };
    struct Arena {
        std::vector<Block> blocks;
        size_t block = 0, used = 0;

        char* take(size_t bytes) {
            while (block < blocks.size() && used + bytes > blocks[block].size) block++, used = 0;
            if (block == blocks.size()) grow(bytes);
            char* p = blocks[block].memory.get() + used;
            used += bytes;
            return p;
        }
        void grow(size_t bytes) {
            const size_t size = (std::max<size_t>(bytes, 1 << 16) + 4095) / 4096 * 4096;
            char* p = static_cast<char*>(std::aligned_alloc(4096, size));
            if (!p) std::abort();
            blocks.push_back({std::unique_ptr<char, Free>(p), size});
            used = 0;
        }
        // With nothing in use: one block as large as all of them, so that the next call finds its memory in one piece.
        void merge() {
            if (blocks.size() < 2) return;
            size_t total = 0;
            for (const Block& b : blocks) total += b.size;
            blocks.clear();
            block = 0;
            grow(total);
        }
    };
    static Arena& arena() {
        static thread_local Arena a;
        return a;
    }

    Arena& arena_;
    size_t block_, used_;
};

}  // namespace bnr
