package main

import (
	"runtime"
	"runtime/debug"
	"runtime/metrics"
)

// gcRoom is what a server's heap may always grow by before it is collected, in
// bytes. Go's own rule, twice what lives, would collect a small heap many times a
// second under load, which took a tenth of the processors.
const gcRoom = 96 << 20

// roomyGC gives the heap room: after each collection it sets the share by which the
// heap may grow, from then on for the life of the process.
func roomyGC() {
	live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	set := 100
	type cycle struct{ _ *byte } // with a pointer it is an object of its own
	var arm func()
	arm = func() {
		metrics.Read(live)
		if percent := gcPercent(live[0].Value.Uint64()); percent != set {
			set = percent
			debug.SetGCPercent(percent)
		}
		runtime.AddCleanup(&cycle{}, func(next func()) { next() }, arm)
	}
	arm()
}

// gcPercent is the share by which a heap may grow of which live bytes are in use.
func gcPercent(live uint64) int {
	return int(max(100, min(gcRoom*100/max(live, 1), 1000)))
}
