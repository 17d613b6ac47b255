package main

import (
	"context"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	// gcRoom is what a server's heap may always grow by before it is collected, in
	// bytes. Go's own rule, twice what lives, would collect a small heap many times a
	// second under load, which took a tenth of the processors.
	gcRoom = 256 << 20
	// gcSlack is how many times its room a heap may grow by before Go's pacer stops
	// those who allocate.
	gcSlack = 3
	// gcLook is the time between two looks at the heap.
	gcLook = 100 * time.Millisecond
)

// collect runs a server's garbage collections until ctx ends. Go's pacer begins one
// when seven tenths of the room is used up, and has whoever allocates mark the more the
// nearer the end of the room comes. Begun here about as early, but with gcSlack times the
// room until that end, nobody has to mark more than Go's least, 64 KiB for each goroutine
// that allocates. With thousands of goroutines on busy processors that is still felt.
func collect(ctx context.Context) {
	var h heap
	looks := time.NewTicker(gcLook)
	defer looks.Stop()
	for {
		if h.look(); h.full() {
			runtime.GC() // concurrent; only its caller waits
			h.look()
		}
		select {
		case <-ctx.Done():
			return
		case <-looks.C:
		}
	}
}

// heap is what is known of Go's heap.
type heap struct {
	cycles    uint64 // collections so far
	live      uint64 // bytes that the last one left
	since     uint64 // bytes allocated when it was first seen to be over
	allocated uint64 // bytes allocated by now
	percent   int    // GOGC
}

// look reads Go's figures, and sets GOGC after each collection.
func (h *heap) look() {
	m := [3]metrics.Sample{{Name: "/gc/cycles/total:gc-cycles"}, {Name: "/gc/heap/live:bytes"}, {Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(m[:])
	h.allocated = m[2].Value.Uint64()
	if cycles := m[0].Value.Uint64(); cycles != h.cycles || h.percent == 0 {
		h.cycles, h.live, h.since = cycles, m[1].Value.Uint64(), h.allocated
		if percent := gcPercent(h.live); percent != h.percent {
			h.percent = percent
			debug.SetGCPercent(percent)
		}
	}
}

// full says whether the heap has grown by its room.
func (h *heap) full() bool { return h.allocated-h.since >= room(h.live) }

// room is by how many bytes a heap may grow in which so many live.
func room(live uint64) uint64 { return max(gcRoom, live/4*3) }

// gcPercent is the GOGC that gives a heap gcSlack times its room.
func gcPercent(live uint64) int {
	return int(min(gcSlack*room(live)/max(live/100, 1), 10_000))
}
