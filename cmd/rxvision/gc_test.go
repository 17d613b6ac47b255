package main

import (
	"runtime"
	"runtime/debug"
	"testing"
)

func TestHeapIsCollectedBeforeThePacerHoldsItUp(t *testing.T) {
	for live, want := range map[uint64]int{0: 10_000, 1 << 20: 10_000, gcRoom: 300, 2 * gcRoom: 225, 100 * gcRoom: 225} {
		if got := gcPercent(live); got < want-1 || got > want+1 {
			t.Errorf("%d bytes in use: %d %%, not %d %%", live, got, want)
		}
	}
	before := debug.SetGCPercent(100)
	defer debug.SetGCPercent(before)
	live := make([]byte, 8<<20) // a server's heap; a few hundred KiB would be full at once by Go's own rule
	runtime.GC()
	defer runtime.KeepAlive(live)
	var h heap
	h.look()
	cycles := h.cycles
	if h.full() {
		t.Fatal("a heap just looked at is full")
	}
	for range 4 * gcRoom >> 20 {
		sink = make([]byte, 1<<20)
		if h.look(); h.full() {
			break
		}
	}
	if !h.full() || h.cycles != cycles {
		t.Fatalf("after %d bytes: full %v, %d collections by Go's own rule", h.allocated-h.since, h.full(), h.cycles-cycles)
	}
}

var sink []byte
