// The threads that run a kernel together, and the list of calls that they can run again.
//
// Every thread of a team calls the kernel; the kernel divides its work among them. A kernel begins when
// what came before is complete, and ends without waiting: whoever starts it lets the team meet afterwards.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <thread>

namespace nanovllm {

class Scratch {  // grows, and is kept for the next call
public:
    ~Scratch() { std::free(data_); }
    void* get(size_t bytes) {
        if (bytes > size_) {
            std::free(data_);
            size_ = (bytes + 4095) / 4096 * 4096;
            data_ = std::aligned_alloc(64, size_);
            if (data_ == nullptr) throw std::bad_alloc();
        }
        return data_;
    }

private:
    void* data_ = nullptr;
    size_t size_ = 0;
};

// What the threads of a team share. Kept by the thread that starts them, from call to call.
struct Commons {
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<uint32_t> meetings{0};
    alignas(64) std::atomic<int64_t> next{0};
    Scratch scratch;
    void* memory = nullptr;
    bool failed = false;
};

class Team {
public:
    const int thread, threads;

    Team(Commons& commons, int thread, int threads)
        : thread(thread), threads(threads), commons_(commons), meetings_(commons.meetings.load()) {}

    // All threads meet. Somebody who waits long lets others have the core: with fewer cores than threads
    // the one that is waited for may need it.
    void barrier() {
        if (threads == 1) return;
        if (commons_.arrived.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
            commons_.arrived.store(0, std::memory_order_relaxed);
            commons_.next.store(0, std::memory_order_relaxed);
            commons_.meetings.store(++meetings_, std::memory_order_release);
            return;
        }
        ++meetings_;
        for (int spins = 0; commons_.meetings.load(std::memory_order_acquire) != meetings_; ++spins)
            if (spins < SPINS)
                pause();
            else
                std::this_thread::yield();
    }

    // f(i) for all i below n; whoever is free takes the next one. Once between two meetings.
    template <class F>
    void each(int64_t n, F f) {
        if (threads == 1) {
            for (int64_t i = 0; i < n; ++i) f(i);
            return;
        }
        for (int64_t i; (i = commons_.next.fetch_add(1, std::memory_order_relaxed)) < n;) f(i);
    }

    // f(first, last): this thread's part of n things side by side.
    template <class F>
    void share(int64_t n, F f) const {
        const int64_t first = n * thread / threads, last = n * (thread + 1) / threads;
        if (first < last) f(first, last);
    }

    // Memory of so many bytes that all threads see, until the next call of this. Meets.
    void* shared(size_t bytes) {
        if (thread == 0) commons_.memory = commons_.scratch.get(bytes);
        barrier();
        return commons_.memory;
    }

    // The call cannot be completed; by one thread, before all meet.
    void fail() { commons_.failed = true; }
    bool failed() const { return commons_.failed; }

    static constexpr int SPINS = 4000;  // some 50 microseconds

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }

private:
    Commons& commons_;
    uint32_t meetings_;
};

}  // namespace nanovllm
