package e2e

import (
	"crypto/rand"
	byteorder "encoding/binary"
	"flag"
	"fmt"
	"maps"
	mrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

var (
	chaosFor   = flag.Duration("chaos.duration", 45*time.Second, "how long TestChaos does harm")
	chaosClock = flag.Bool("chaos.clock", false, "let clocks jump in TestChaos too, which builds everything anew")
	chaosSeed  = flag.Uint64("chaos.seed", 0, "seed of TestChaos's faults; 0: a fresh one, printed")
)

// disk is a file system of a server's own, which can be full or stand still.
type disk struct {
	t      testing.TB
	path   string
	filler string
}

// newDisk mounts a file system at path; nil, with the reason logged, where that
// cannot be done.
func newDisk(t testing.TB, path string) *disk {
	const size = 1 << 30 // of a sparse file
	if err := os.MkdirAll(path, 0o700); err != nil {
		t.Fatal(err)
	}
	image := path + ".img"
	f, err := os.Create(image)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	for _, c := range [][]string{{"mkfs.ext4", "-q", "-m", "0", image}, {"mount", "-o", "loop", image, path}} {
		if out, err := exec.Command(c[0], c[1:]...).CombinedOutput(); err != nil {
			t.Logf("no file system of its own for %s, its disk is spared: %s: %v: %s", filepath.Base(path), c[0], err, out)
			return nil
		}
	}
	d := &disk{t: t, path: path, filler: filepath.Join(path, "filler")}
	t.Cleanup(func() {
		d.thaw()
		if out, err := exec.Command("umount", "-l", path).CombinedOutput(); err != nil {
			t.Errorf("umount %s: %v: %s", path, err, out)
		}
	})
	return d
}

// freeze makes every write wait, thaw lets them through.
func (d *disk) freeze() { d.must("fsfreeze", "-f", d.path) }
func (d *disk) thaw()   { _ = exec.Command("fsfreeze", "-u", d.path).Run() } // fails where nothing is frozen

func (d *disk) must(name string, args ...string) {
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		d.t.Errorf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
}

// fill takes all the space that is left, empty gives it back.
func (d *disk) fill() {
	var s syscall.Statfs_t
	if err := syscall.Statfs(d.path, &s); err != nil {
		d.t.Error(err)
		return
	}
	free := int64(s.Bavail) * s.Bsize
	for ; free > 0; free /= 2 { // what fallocate cannot have in one piece
		_ = exec.Command("fallocate", "-l", fmt.Sprint(free), fmt.Sprintf("%s-%d", d.filler, free)).Run()
	}
}

func (d *disk) empty() {
	files, err := filepath.Glob(d.filler + "-*")
	if err != nil {
		d.t.Error(err)
	}
	for _, f := range files {
		if err := os.Remove(f); err != nil {
			d.t.Error(err)
		}
	}
}

// nemesis does harm to a region, one fault at a time, from a seed.
type nemesis struct {
	r       *region
	agents  []*agents // the first have so many nodes that replacements pause when they fall silent together
	rng     *mrand.Rand
	disks   []*disk
	clocks  []clock
	done    map[string]int // faults by kind
	damages bool           // files are changed too
}

// hold is how long a fault lasts, from half of d to all of it.
func (n *nemesis) hold(d time.Duration) {
	time.Sleep(d/2 + time.Duration(n.rng.Int64N(int64(d/2))))
}

// others are the hosts but i, in random order.
func (n *nemesis) others(i int) []int {
	var out []int
	for _, j := range n.rng.Perm(len(n.r.servers)) {
		if j != i {
			out = append(out, j)
		}
	}
	return out
}

// faults are all kinds. Each ends with everything healed and every server running.
func (n *nemesis) faults() map[string]func() {
	any1 := func() int { return n.rng.IntN(len(n.r.servers)) }
	both := func(i, j int) {
		n.r.net.cut(i, j)
		n.r.net.cut(j, i)
	}
	heal := func(d time.Duration) {
		n.hold(d)
		n.r.net.heal()
	}
	isolate := func(i int) {
		for _, j := range n.others(i) {
			both(i, j)
		}
		if n.rng.IntN(2) == 0 { // from the agents too
			for _, a := range n.agents {
				both(i, a.host)
			}
		}
		heal(6 * time.Second)
	}
	lonely := func(a *agents) {
		for i := range n.r.servers {
			both(i, a.host)
		}
		heal(12 * time.Second)
	}
	kill := func(servers ...int) {
		for _, i := range servers {
			n.r.servers[i].kill()
		}
		n.hold(3 * time.Second)
		for _, i := range servers {
			n.r.servers[i].start()
		}
	}
	all := map[string]func(){
		"kill a server":      func() { kill(any1()) },
		"kill the leader":    func() { kill(n.r.leader()) },
		"kill all servers":   func() { kill(n.others(-1)...) },
		"stop a server":      func() { s := n.r.servers[any1()]; s.pause(); n.hold(5 * time.Second); s.resume() },
		"stop the leader":    func() { s := n.r.servers[n.r.leader()]; s.pause(); n.hold(5 * time.Second); s.resume() },
		"leader in minority": func() { isolate(n.r.leader()) },
		"bridge partition": func() {
			o := n.others(-1)
			both(o[0], o[1])
			heal(6 * time.Second)
		},
		"one-way from the leader": func() {
			l := n.r.leader()
			for _, j := range n.others(l) {
				n.r.net.cut(l, j)
			}
			heal(6 * time.Second)
		},
		"one-way to the leader": func() {
			l := n.r.leader()
			n.r.net.cut(n.others(l)[0], l)
			heal(6 * time.Second)
		},
		"leadership transfer": func() {
			to := n.others(n.r.leader())[0]
			_, _, _ = n.r.call("PUT", to, "/v1/operator/raft/transfer-leadership?address="+n.r.net.advertised(to)+":"+fmt.Sprint(regionRaft), nil)
		},
	}
	if n.agents != nil {
		few, many := n.agents[len(n.agents)-1], n.agents[0]
		all["few agents cut off"] = func() { lonely(few) }
		all["many agents cut off"] = func() { lonely(many) }
		all["agents stand still"] = func() {
			a := n.agents[n.rng.IntN(len(n.agents))]
			a.pause()
			n.hold(12 * time.Second)
			a.resume()
		}
		all["one-way to agents"] = func() {
			a := n.agents[n.rng.IntN(len(n.agents))]
			for i := range n.r.servers {
				n.r.net.cut(i, a.host)
			}
			heal(8 * time.Second)
		}
		all["agents lose a server"] = func() {
			i := any1()
			for _, a := range n.agents {
				both(i, a.host)
			}
			heal(6 * time.Second)
		}
	}
	if n.damages {
		maps.Copy(all, n.damage())
	}
	if n.disks != nil && n.disks[0] != nil {
		all["disk stands still"] = func() { d := n.disks[any1()]; d.freeze(); n.hold(4 * time.Second); d.thaw() }
		all["leader's disk stands still"] = func() { d := n.disks[n.r.leader()]; d.freeze(); n.hold(4 * time.Second); d.thaw() }
		all["disk is full"] = func() { d := n.disks[any1()]; d.fill(); n.hold(6 * time.Second); d.empty() }
		all["leader's disk is full"] = func() { d := n.disks[n.r.leader()]; d.fill(); n.hold(6 * time.Second); d.empty() }
	}
	if n.clocks != nil {
		all["a clock jumps"] = func() {
			c := n.clocks[any1()]
			c.jump(n.r.t, time.Duration(n.rng.Int64N(int64(2*maxJump)))-maxJump)
			n.hold(5 * time.Second)
			if n.rng.IntN(2) == 0 {
				c.jump(n.r.t, 0)
			}
		}
	}
	return all
}

// run does harm until the time is over, each kind at least once when it suffices.
func (n *nemesis) run(d time.Duration) {
	faults := n.faults()
	kinds := sortedKeys(faults)
	for _, k := range kinds {
		n.done[k] += 0 // to be told even if its turn does not come
	}
	var queue []string
	for end := time.Now().Add(d); time.Now().Before(end); {
		if len(queue) == 0 {
			for _, k := range n.rng.Perm(len(kinds)) {
				queue = append(queue, kinds[k])
			}
		}
		kind := queue[0]
		queue = queue[1:]
		n.r.t.Logf("%s: %s", time.Now().Format("15:04:05.0"), kind)
		faults[kind]()
		n.done[kind]++
		n.revive()
		n.hold(2 * time.Second)
	}
}

// revive starts servers that have ended by themselves with a clear reason, as an
// init system does.
func (n *nemesis) revive() {
	for _, s := range n.r.servers {
		if s.failed() {
			n.r.t.Logf("%s ended (%v) and is started again", s.name, s.err)
			s.start()
		}
	}
}

func sortedKeys[V any](m map[string]V) []string {
	var out []string
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

// TestChaos harms three servers in every way at hand, under a load of API clients and
// of simulated agents, and checks that they lose nothing, agree, give no device
// twice, and work on afterwards. -chaos.duration and -chaos.seed (`make chaos`) give
// the long form.
func TestChaos(t *testing.T) { chaos(t, *chaosFor, true) }

// TestChaosOverProxies does the harm of network and processes where no network
// namespaces can be made: over proxies.
func TestChaosOverProxies(t *testing.T) {
	t.Setenv(noNamespaces, "1")
	chaos(t, min(*chaosFor, 15*time.Second), false)
}

// Nodes on the two hosts of agents: the second has few enough to be given up at once.
const manyNodes, fewNodes = 3, 1

// chaos harms a region for a while and checks it; all says whether disks, files and,
// if asked for, clocks are harmed too.
func chaos(t *testing.T, d time.Duration, all bool) {
	seed := *chaosSeed
	if seed == 0 {
		var b [8]byte
		rand.Read(b[:])
		seed = byteorder.LittleEndian.Uint64(b[:])
	}
	t.Logf("seed %d, %s: go test ./e2e -run '^%s$' -chaos.seed %d -chaos.duration %s", seed, d, t.Name(), seed, d)
	program, env := binary, []string(nil)
	if all && *chaosClock {
		began := time.Now()
		program = buildWithClock(t)
		t.Logf("built with clocks that jump in %s", time.Since(began).Round(time.Second))
		past := clock(filepath.Join(t.TempDir(), "past")) // certificates are older than clocks may be wrong
		past.jump(t, -2*maxJump)
		env = []string{past.env()}
	}
	const servers = 3
	r := newRegionOn(t, newNetwork(t, servers+2, regionRPC, regionRaft), program, env, servers, servers,
		"--eval-gc-threshold", "1m", "--batch-eval-gc-threshold", "1m", "--job-gc-interval", "20s")
	n := &nemesis{r: r, rng: mrand.New(mrand.NewPCG(seed, 0)), done: map[string]int{}, damages: all}
	for _, s := range r.servers {
		if all {
			n.disks = append(n.disks, newDisk(t, s.data))
		}
		if env != nil {
			c := clock(r.path(s.name + ".clock"))
			c.jump(t, 0)
			s.env = append(s.env, c.env())
			n.clocks = append(n.clocks, c)
		}
	}
	r.start()
	r.bootstrapACL()
	n.agents = []*agents{r.attach(servers, manyNodes), r.attach(servers+1, fewNodes)}
	if n.damages { // a restore leaves a snapshot on every server, and nothing in the logs before it
		r.run("snapshot", "save", "begin.snap")
		r.run("snapshot", "restore", "begin.snap")
	}
	load, devices := startAPILoad(r, seed, 8, 4), startGPULoad(r, seed, n.agents...)
	devices.register(0, deviceJob(tooLarge, "service", 1, 9, ""))
	n.run(d)
	for _, c := range n.clocks {
		c.jump(t, 0)
	}
	load.stop()
	devices.stop()
	t.Log(load)
	t.Log(devices)
	var table strings.Builder
	total := 0
	for _, kind := range sortedKeys(n.done) {
		fmt.Fprintf(&table, "%5d × %s\n", n.done[kind], kind)
		total += n.done[kind]
	}
	total -= n.done[ofNoAccount]
	t.Logf("seed %d: %d faults in %s\n%s", seed, total, d, table.String())
	devices.check(t)
	r.settle()
	r.checkBlocked()
	load.check(t)
	if load.writes.Load() == 0 || len(load.ops) == 0 {
		t.Error("no write was accepted: nothing was tested")
	}
}

// settle waits until every server runs, all were seen at an equal index, and work has
// drained; at each such index their states must be equal. Indexes move on, since the
// leader still collects what has ended, and a hash takes its time: servers are asked at once.
func (r *region) settle() {
	r.t.Helper()
	r.leader()
	seen := map[uint64]map[string]int{} // index → hash → servers that had it, by their bits
	r.await("all servers have applied the same index", func() bool {
		type stateHash struct {
			Index uint64
			Hash  string
		}
		hashes := make([]stateHash, len(r.servers))
		var wg sync.WaitGroup
		for i := range r.servers {
			wg.Go(func() { r.get(i, "/v1/operator/state-hash?stale", &hashes[i]) })
		}
		wg.Wait()
		for i, h := range hashes {
			if h.Index == 0 {
				continue // no answer
			}
			if seen[h.Index] == nil {
				seen[h.Index] = map[string]int{}
			}
			seen[h.Index][h.Hash] |= 1 << i
			if len(seen[h.Index]) > 1 {
				r.t.Fatalf("at index %d the servers' states differ: %v", h.Index, seen[h.Index])
			}
			if seen[h.Index][h.Hash] == 1<<len(r.servers)-1 {
				return true
			}
		}
		return false
	})
	r.await("no evaluation is left to do", func() bool {
		var evals []struct{ ID string }
		return r.get(0, `/v1/evaluations?filter=Status+==+"pending"`, &evals) && len(evals) == 0
	})
}
