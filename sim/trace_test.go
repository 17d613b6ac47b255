package sim

import (
	"strings"
	"testing"
)

const traceNodes = `sn,cpu_milli,memory_mib,gpu,model
n0,64000,262144,8,A
n1,64000,262144,8,A
n2,32000,131072,4,B
n3,32000,131072,0,
`

const tracePods = `name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos
p0,4000,8192,1,500,,LS
p1,4000,8192,1,300,A|B,LS
p2,4000,8192,1,1000,B,LS
p3,16000,65536,4,1000,,LS
p4,32000,65536,8,1000,A,LS
p5,2000,4096,0,0,,BE
`

// TestTraceReplay replays a small trace by every policy: what is allocated never exceeds what was asked for
// nor what there is, the same seed gives the same course, and the scheduler's placement
// leaves no less usable than chance does.
func TestTraceReplay(t *testing.T) {
	trace, err := ReadTrace(strings.NewReader(traceNodes), strings.NewReader(tracePods))
	if err != nil {
		t.Fatal(err)
	}
	if c := trace.Capacity(); c != 20_000 {
		t.Errorf("capacity %d", c)
	}
	mean := map[string]float64{}
	const seeds = 20
	for _, policy := range Policies {
		for seed := range uint64(seeds) {
			r, err := trace.Replay(policy, seed)
			if err != nil {
				t.Fatal(err)
			}
			if len(r.Allocated) < 130 || r.Placed+r.Failed < len(trace.Pods)/2 {
				t.Fatalf("%s, seed %d: ended early: %+v", policy, seed, r)
			}
			for percent, got := range r.Allocated {
				if got > 100 || percent > 0 && got < r.Allocated[percent-1] {
					t.Fatalf("%s, seed %d: %.1f %% of the GPUs at %d %%", policy, seed, got, percent)
				}
			}
			mean[policy] += r.At(130) / seeds
			again, err := trace.Replay(policy, seed)
			if err != nil || again.At(130) != r.At(130) || again.Placed != r.Placed {
				t.Fatalf("%s, seed %d: not the same again", policy, seed)
			}
		}
	}
	t.Logf("allocated at 130 %%: %v", mean)
	if mean["fgd"] <= mean["random"] {
		t.Error("placement by fragmentation is no better than chance")
	}
}

// TestCeiling looks that what is placed stays below what there is room for.
func TestCeiling(t *testing.T) {
	trace, err := ReadTrace(strings.NewReader("sn,cpu_milli,memory_mib,gpu,model\nn0,4000,1000,4,A\n"),
		strings.NewReader("name,cpu_milli,memory_mib,num_gpu,gpu_milli\np0,1000,1,1,500\np1,1000,1,1,300\np2,4000,1,3,1000\np3,1000,1,0,0\n"))
	if err != nil {
		t.Fatal(err)
	}
	for seed := range uint64(20) {
		c := trace.Ceiling(seed, 100)
		if c.Room > 100 || c.Room < 75 || c.Shares > 100 || c.Shares < 75 {
			t.Errorf("seed %d: %+v", seed, c)
		}
		if r, err := trace.Replay("fgd", seed); err != nil || r.At(100) > c.Room+1e-9 {
			t.Errorf("seed %d: %.1f of at most %+v: %v", seed, r.At(100), c, err)
		}
	}
}

// TestArrivals looks that pods are asked for until their GPUs come to the percentage, and not far beyond.
func TestArrivals(t *testing.T) {
	trace, err := ReadTrace(strings.NewReader(traceNodes), strings.NewReader(tracePods))
	if err != nil {
		t.Fatal(err)
	}
	for _, percent := range []int64{20, 130, 1000} { // fewer than the list has, and more
		for seed := range uint64(10) {
			total, last := int64(0), int64(0)
			for _, p := range trace.Arrivals(seed, percent) {
				last = p.Demand()
				total += last
			}
			if want := trace.Capacity() * percent / 100; total < want || total-last >= want {
				t.Errorf("%d %%, seed %d: %d thousandths, the last %d", percent, seed, total, last)
			}
		}
	}
}

func TestReadTraceTellsAllFaults(t *testing.T) {
	_, err := ReadTrace(
		strings.NewReader("sn,cpu_milli,memory_mib,gpu,model\nn0,many,1,1,A\nn1,1,1,65,A\n"),
		strings.NewReader("name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec\np0,1,1,2,500,\np1,1,-1,1,500,\n"))
	for _, want := range []string{`nodes, line 2: cpu_milli is "many"`, "nodes, line 3: 65 GPUs", "pods, line 2: 2 GPUs of 500 thousandths", `pods, line 3: memory_mib is "-1"`} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v\nlacks %q", err, want)
		}
	}
	if _, err := ReadTrace(strings.NewReader("sn,gpu\n"), strings.NewReader("")); err == nil || !strings.Contains(err.Error(), "no column cpu_milli") || !strings.Contains(err.Error(), "pods: EOF") {
		t.Errorf("no columns: %v", err)
	}
}
