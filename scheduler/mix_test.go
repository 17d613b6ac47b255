package scheduler

import (
	"fmt"
	"testing"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/scheduler/place"
)

// BenchmarkMixOf counts what 100,000 jobs with GPUs ask for, of 200 kinds.
func BenchmarkMixOf(b *testing.B) {
	s := newMemStore(b)
	s.check = false
	for i := range 100_000 {
		s.run(service(fmt.Sprintf("job-%06d", i), 1, func(j *cluster.Job) {
			r := j.TaskGroups[0].Tasks[0].Resources
			r.CPU, r.Devices = 1_000+i%200, []*cluster.RequestedDevice{{Name: "nvidia/gpu", Count: 1}}
		}))
	}
	snap := s.State().Snapshot()
	var tally place.Tally
	mixOf(snap, &tally)
	b.ReportAllocs()
	for b.Loop() {
		if mixOf(snap, &tally) == nil {
			b.Fatal("no mix")
		}
	}
}
