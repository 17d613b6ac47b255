package place

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/rxvision/rxvision/cluster"
)

// TestJudgeEach compares the cost of a share on each GPU with that of the devices as they would be.
func TestJudgeEach(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		var room []deviceRoom
		var prices []int64
		for g := range 1 + rnd.IntN(3) {
			prices = append(prices, rnd.Int64N(50))
			for range 1 + rnd.IntN(4) {
				r := deviceRoom{id: fmt.Sprint(len(room)), group: int32(g), whole: true, milli: cluster.WholeMilli, mib: 8_000, memory: 8_000}
				if rnd.IntN(2) == 0 {
					r.take(&deviceAsk{count: 1, milli: 1 + rnd.Int64N(900)})
				}
				room = append(room, r)
			}
		}
		var work []Work
		for i := range 20 {
			d := &cluster.RequestedDevice{Name: "nvidia/gpu", Count: uint64(1 + i%3)}
			if i%2 == 0 {
				d.Name, d.Count = "nvidia/gpu-milli", uint64(50*(1+i))
			}
			g := &cluster.TaskGroup{Name: "g", Count: 1, Tasks: []*cluster.Task{{Name: "t", Resources: &cluster.Resources{CPU: 400 * i, MemoryMB: 300 * i, Devices: []*cluster.RequestedDevice{d}}}}}
			work = append(work, Work{Job: &cluster.Job{}, Group: g, Allocs: 1 + rnd.Int64N(9)})
		}
		m := NewMix(work)
		reached := make([]uint64, len(m.shapes))
		for i := range reached {
			reached[i] = rnd.Uint64N(1 << len(prices))
		}
		j := judge{mix: m, reached: reached, prices: prices, cpu: rnd.Int64N(8_000), memory: rnd.Int64N(8_000)}
		share := &deviceAsk{name: "nvidia/gpu", count: 1, milli: 1 + rnd.Int64N(99)}
		var tried []int
		for k := range room {
			if share.fits(&room[k]) {
				tried = append(tried, k)
			}
		}
		if len(tried) == 0 {
			continue
		}
		costs := append([]int64(nil), j.each(room, share, tried)...)
		for i, k := range tried {
			was := room[k]
			room[k].take(share)
			if want := j.cost(room); costs[i] != want {
				t.Fatalf("on %s of %+v: %d, want %d", room[k].id, room, costs[i], want)
			}
			room[k] = was
		}
	}
}

// TestPrices: what work names is dearer than what it does not, the dearer the less there is of it.
func TestPrices(t *testing.T) {
	r := &benchReader{version: new(int)}
	for i, model := range []string{"A", "A", "A", "A", "B", "C"} {
		r.nodes = append(r.nodes, &cluster.Node{
			ID: fmt.Sprint(i), Datacenter: "dc1", Drivers: map[string]*cluster.DriverInfo{"exec": {Detected: true, Healthy: true}}, NodePool: cluster.DefaultNodePool, Status: cluster.NodeStatusReady, SchedulingEligibility: cluster.NodeEligible,
			NodeResources: &cluster.NodeResources{Devices: []*cluster.NodeDeviceResource{{Vendor: "nvidia", Type: "gpu", Name: model, Instances: []*cluster.NodeDevice{{ID: fmt.Sprint("g", i), Healthy: true}}}}},
		})
	}
	ask := func(model string, allocs int64) Work {
		d := &cluster.RequestedDevice{Name: "nvidia/gpu", Count: 1}
		if model != "" {
			d.Name += "/" + model
		}
		g := &cluster.TaskGroup{Name: "g", Count: 1, Tasks: []*cluster.Task{{Name: "t", Driver: "exec", Resources: &cluster.Resources{Devices: []*cluster.RequestedDevice{d}}}}}
		return Work{Job: &cluster.Job{Datacenters: []string{"*"}}, Group: g, Allocs: allocs}
	}
	var c Cache
	c.Expect(NewMix([]Work{ask("", 10), ask("A", 4), ask("B", 4)}))
	c.View(r)
	a, b, other := c.hosts[0].prices[0], c.hosts[4].prices[0], c.hosts[5].prices[0]
	if !(b > a && a > other && other > 0) {
		t.Errorf("one B costs %d, each of four A %d, one that nobody names %d", b, a, other)
	}
}

// TestTally makes the same mix as one that knows nothing, while groups come, go and ask for the same.
func TestTally(t *testing.T) {
	var tally Tally
	var work []Work
	for i := range 40 {
		g := &cluster.TaskGroup{Name: "g", Count: 1, Tasks: []*cluster.Task{{Name: "t", Resources: &cluster.Resources{CPU: 100 * (i % 7), Devices: []*cluster.RequestedDevice{{Name: "nvidia/gpu", Count: 1}}}}}}
		work = append(work, Work{Job: &cluster.Job{}, Group: g, Allocs: int64(1 + i%5)})
		from := max(0, i-10)
		got, want := tally.Mix(work[from:]), NewMix(work[from:])
		if len(got.shapes) != len(want.shapes) || got.total != want.total || !got.Like(want) {
			t.Fatalf("%d shapes of %d, want %d of %d", len(got.shapes), got.total, len(want.shapes), want.total)
		}
		for k := range got.shapes {
			if g, w := &got.shapes[k], &want.shapes[k]; g.key != w.key || g.weight != w.weight {
				t.Fatalf("shape %d weighs %d, want %d", k, g.weight, w.weight)
			}
		}
	}
}
