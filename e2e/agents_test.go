package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// The load of devices: simulated agents with eight GPUs each take services that
// come, change and go, and batch jobs that end. No device may ever be given twice,
// by what the servers say or by what the agents do, and at the end servers and agents
// must tell the same.

// swarmHTTP is where a process of simulated agents tells what they run.
const swarmHTTP = 7699

// agents is a process of simulated agents on a host of its own.
type agents struct {
	r       *region
	host    int
	count   int
	process *os.Process
}

// held is an allocation that an agent has not ended.
type held struct {
	Node, Alloc, Job, Status string
	Stopping                 bool
	Devices                  []string
}

// agentView is what simulated agents know themselves.
type agentView struct {
	Nodes, Attached int
	Taken           int64
	Held            []held
	Conflicts       []json.RawMessage
}

// attach runs simulated agents on a host until the test ends, and waits for them.
func (r *region) attach(host, count int) *agents {
	r.t.Helper()
	lines := strings.Split(strings.TrimSpace(r.run("node", "intro", "--uses", fmt.Sprint(count))), "\n")
	args := []string{
		"bench", "nodes", "--count", fmt.Sprint(count), "--profile", "gpu", "--prefix", fmt.Sprintf("host%d", host), "--ca", "ca.pem",
		"--batch-time", "2s", "--stop-time", "300ms", "--http-addr", net.JoinHostPort(r.net.ip(host), fmt.Sprint(swarmHTTP)),
	}
	for i := range r.servers {
		args = append(args, "--server", net.JoinHostPort(r.net.advertised(i), fmt.Sprint(regionRPC)))
	}
	process, _ := r.spawnOn(host, []string{"RXVISION_INTRO_TOKEN=" + lines[len(lines)-1]}, args...)
	a := &agents{r: r, host: host, count: count, process: process}
	r.await(fmt.Sprintf("%d simulated agents are attached", count), func() bool {
		v, err := a.view()
		return err == nil && v.Attached == count
	})
	return a
}

func (a *agents) view() (v agentView, err error) {
	resp, err := a.r.http.Get("http://" + net.JoinHostPort(a.r.net.ip(a.host), fmt.Sprint(swarmHTTP)))
	if err != nil {
		return v, err
	}
	defer resp.Body.Close()
	return v, json.NewDecoder(resp.Body).Decode(&v)
}

func (a *agents) pause()  { _ = a.process.Signal(syscall.SIGSTOP) }
func (a *agents) resume() { _ = a.process.Signal(syscall.SIGCONT) }

// gpuLoad runs jobs with devices until stop.
type gpuLoad struct {
	r      *region
	agents []*agents
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu       sync.Mutex
	services map[string]int // job → allocations of its last accepted form
	batch    map[string]bool
	problems []string
	doubles  map[string]bool // device and its two holders, once told

	registered, stopped, unknowns, completed, samples, views, most atomic.Int64
}

const (
	gpuServices = 4
	gpuBatches  = 2
	tooLarge    = "gpu-too-large" // wants more devices than any node has
	maxProblems = 20              // that are told
)

func startGPULoad(r *region, seed uint64, agents ...*agents) *gpuLoad {
	ctx, cancel := context.WithCancel(context.Background())
	l := &gpuLoad{r: r, agents: agents, cancel: cancel, services: map[string]int{}, batch: map[string]bool{}, doubles: map[string]bool{}}
	for i := range gpuServices {
		l.wg.Go(func() { l.serve(ctx, i, rand.New(rand.NewPCG(seed, 2000+uint64(i)))) })
	}
	for i := range gpuBatches {
		l.wg.Go(func() { l.runBatches(ctx, i, rand.New(rand.NewPCG(seed, 3000+uint64(i)))) })
	}
	l.wg.Go(func() { l.sample(ctx, rand.New(rand.NewPCG(seed, 4000))) })
	l.wg.Go(func() { l.watchAgents(ctx) })
	return l
}

// deviceJob wants so many devices for each of its allocations.
func deviceJob(id, kind string, count, devices int, value string) map[string]any {
	job := map[string]any{
		"ID": id, "Name": id, "Type": kind, "Datacenters": []string{"dc1"}, "Meta": map[string]string{"value": value},
		"TaskGroups": []any{map[string]any{
			"Name": "g", "Count": count,
			"Tasks": []any{map[string]any{
				"Name": "t", "Driver": "raw_exec", "Config": map[string]any{"command": "/bin/true"},
				"Env": map[string]string{"VALUE": value}, // another one means another task
				"Resources": map[string]any{
					"CPU": 100, "MemoryMB": 128, "Devices": []any{map[string]any{"Name": "nvidia/gpu", "Count": devices}},
				},
			}},
		}},
	}
	if kind == "service" && count > 1 {
		job["Update"] = map[string]any{"MaxParallel": 1, "MinHealthyTime": int64(100 * time.Millisecond), "HealthyDeadline": int64(5 * time.Minute), "ProgressDeadline": int64(10 * time.Minute)}
	}
	return job
}

func (l *gpuLoad) register(server int, job map[string]any) bool {
	status, body, err := l.r.call(http.MethodPut, server, "/v1/jobs", map[string]any{"Job": job})
	switch {
	case err == nil && status == http.StatusOK:
		l.registered.Add(1)
		return true
	case err == nil && status == http.StatusBadRequest:
		l.problem("job %s is refused: %s", job["ID"], body)
	}
	l.unknowns.Add(1)
	return false
}

func (l *gpuLoad) problem(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.problems) < maxProblems {
		l.problems = append(l.problems, time.Now().Format("15:04:05.0 ")+fmt.Sprintf(format, args...))
	}
}

// serve registers, changes and stops one service.
func (l *gpuLoad) serve(ctx context.Context, i int, rng *rand.Rand) {
	id := fmt.Sprintf("gpu-service-%d", i)
	count := 0
	register := func(n int) bool {
		server := rng.IntN(len(l.r.servers))
		count = 1 + rng.IntN(2)
		return l.register(server, deviceJob(id, "service", count, 1+rng.IntN(2), fmt.Sprint(n)))
	}
	n := 0
	for ; ctx.Err() == nil; n++ {
		if rng.IntN(4) == 0 {
			status, _, err := l.r.call(http.MethodDelete, rng.IntN(len(l.r.servers)), "/v1/job/"+id, nil)
			if err == nil && status == http.StatusOK {
				l.stopped.Add(1)
			} else {
				l.unknowns.Add(1)
			}
		} else {
			register(n)
		}
		pause(ctx, time.Duration(300+rng.IntN(2500))*time.Millisecond)
	}
	for end := time.Now().Add(2 * time.Minute); !register(n); { // all faults are over: this one counts
		if time.Now().After(end) {
			l.problem("%s could not be registered within two minutes without faults", id)
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.services[id] = count
}

// runBatches registers one batch job after the other and waits for its end, for a while.
func (l *gpuLoad) runBatches(ctx context.Context, i int, rng *rand.Rand) {
	for n := 0; ctx.Err() == nil; n++ {
		id := fmt.Sprintf("gpu-batch-%d-%d", i, n)
		accepted := l.register(rng.IntN(len(l.r.servers)), deviceJob(id, "batch", 1+rng.IntN(3), 1+rng.IntN(2), ""))
		if accepted {
			l.mu.Lock()
			l.batch[id] = true
			l.mu.Unlock()
		}
		for tries := 0; tries < 100 && ctx.Err() == nil; tries++ {
			var job struct{ Status string }
			if l.r.get(rng.IntN(len(l.r.servers)), "/v1/job/"+id+"?stale", &job) && job.Status == "dead" {
				l.completed.Add(1)
				break
			}
			pause(ctx, 200*time.Millisecond)
		}
	}
}

// allocStub is what the servers say of an allocation.
type allocStub struct {
	ID, NodeID, JobID, DesiredStatus, ClientStatus string
	AllocatedResources                             struct {
		Tasks map[string]struct {
			Devices []struct{ DeviceIDs []string }
		}
	}
}

func (a *allocStub) devices() (ids []string) {
	for _, t := range a.AllocatedResources.Tasks {
		for _, d := range t.Devices {
			ids = append(ids, d.DeviceIDs...)
		}
	}
	return ids
}

// living are the allocations that the servers do not know to be over, verified by the quorum.
func (l *gpuLoad) living(server int) (allocs []allocStub, ok bool) {
	filter := url.QueryEscape(`ClientStatus == "pending" or ClientStatus == "running" or ClientStatus == "unknown"`)
	ok = l.r.get(server, "/v1/allocations?consistent&resources=true&task_states=false&filter="+filter, &allocs)
	return allocs, ok
}

// sample looks at the servers' state again and again: a device has one holder.
func (l *gpuLoad) sample(ctx context.Context, rng *rand.Rand) {
	for ; ctx.Err() == nil; pause(ctx, 200*time.Millisecond) {
		if allocs, ok := l.living(rng.IntN(len(l.r.servers))); ok {
			l.samples.Add(1)
			l.checkDevices(allocs)
		}
	}
}

// fresh says whether these two at one device were not told of before.
func (l *gpuLoad) fresh(device, one, other string) bool {
	key := fmt.Sprint(device, min(one, other), max(one, other))
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.doubles[key] || len(l.doubles) >= maxProblems {
		return false
	}
	l.doubles[key] = true
	return true
}

func (l *gpuLoad) checkDevices(allocs []allocStub) {
	holders := map[string]*allocStub{}
	for i := range allocs {
		a := &allocs[i]
		for _, d := range a.devices() {
			if h := holders[d]; h != nil && l.fresh(d, h.ID, a.ID) {
				l.problem("device %s is held by %s of %s on node %s (%s, %s) and by %s of %s on node %s (%s, %s)", d,
					h.ID, h.JobID, h.NodeID, h.DesiredStatus, h.ClientStatus, a.ID, a.JobID, a.NodeID, a.DesiredStatus, a.ClientStatus)
			}
			holders[d] = a
		}
	}
	l.most.Store(max(l.most.Load(), int64(len(holders))))
}

// watchAgents looks at what the agents do: each tells which devices it was given twice.
func (l *gpuLoad) watchAgents(ctx context.Context) {
	told := map[*agents]int{}
	for ; ctx.Err() == nil; pause(ctx, 500*time.Millisecond) {
		for _, a := range l.agents {
			l.checkAgents(a, told)
		}
	}
	for _, a := range l.agents {
		l.checkAgents(a, told)
	}
}

func (l *gpuLoad) checkAgents(a *agents, told map[*agents]int) {
	v, err := a.view()
	if err != nil {
		return // it stands still
	}
	l.views.Add(1)
	for _, c := range v.Conflicts[min(told[a], len(v.Conflicts)):] {
		l.problem("an agent was given a device that was taken: %s", c)
	}
	told[a] = len(v.Conflicts)
	holders := map[string]held{} // of what runs and was not asked to stop
	for _, h := range v.Held {
		for _, d := range h.Devices {
			if h.Status != "running" {
				continue
			}
			if other, taken := holders[d]; taken && l.fresh("on agents: "+d, other.Alloc, h.Alloc) {
				l.problem("device %s runs %s of %s and %s of %s at once", d, other.Alloc, other.Job, h.Alloc, h.Job)
			}
			holders[d] = h
		}
	}
}

// stop ends the load with each service in a form that was accepted.
func (l *gpuLoad) stop() {
	l.cancel()
	l.wg.Wait()
}

// check waits until servers and agents tell the same: every service runs whole, every batch
// job has ended, nothing runs that should not.
func (l *gpuLoad) check(t testing.TB) {
	t.Helper()
	l.mu.Lock()
	problems, services := l.problems, l.services
	l.mu.Unlock()
	for _, p := range problems {
		t.Error(p)
	}
	var off error
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(100 * time.Millisecond) {
		if off = l.compare(services); off == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("two minutes after the last fault work has not drained: %v", off)
		}
	}
	if l.samples.Load() == 0 || l.most.Load() == 0 || l.completed.Load() == 0 {
		t.Errorf("too little was tested: %s", l)
	}
}

// compare says what is not as it should be once all is well.
func (l *gpuLoad) compare(services map[string]int) error {
	allocs, ok := l.living(0)
	if !ok {
		return errors.New("s1 does not list allocations")
	}
	var errs []error
	fault := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	state, running := map[string]*allocStub{}, map[string]int{}
	for i := range allocs {
		a := &allocs[i]
		state[a.ID] = a
		if a.DesiredStatus != "run" || a.ClientStatus != "running" {
			fault("%s of %s is wanted to %s and %s", a.ID, a.JobID, a.DesiredStatus, a.ClientStatus)
		}
		running[a.JobID]++
	}
	for id, count := range services {
		if running[id] != count {
			fault("%s has %d allocations, wants %d", id, running[id], count)
		}
		delete(running, id)
	}
	for id, n := range running {
		fault("%s has %d allocations although it should have ended", id, n)
	}
	for _, a := range l.agents {
		v, err := a.view()
		if err != nil {
			fault("the agents on host %d tell nothing: %w", a.host, err)
			continue
		}
		if v.Attached != a.count {
			fault("%d of %d agents on host %d are attached", v.Attached, a.count, a.host)
		}
		for _, h := range v.Held {
			if s := state[h.Alloc]; s == nil || h.Status != "running" || h.Stopping || s.NodeID != h.Node {
				fault("an agent holds %s of %s (%s, stopping: %v), which the servers see as %+v", h.Alloc, h.Job, h.Status, h.Stopping, s)
			}
			delete(state, h.Alloc)
		}
	}
	for _, s := range state {
		fault("%s of %s runs for the servers, and on no agent", s.ID, s.JobID)
	}
	var jobs []struct{ ID, Status string }
	if !l.r.get(0, "/v1/jobs?prefix=gpu-batch-", &jobs) {
		fault("s1 does not list jobs")
	}
	known := map[string]bool{}
	for _, j := range jobs {
		known[j.ID] = true
		if j.Status != "dead" {
			fault("%s is %s", j.ID, j.Status)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for id := range l.batch {
		if !known[id] {
			fault("%s was accepted and is not there", id)
		}
	}
	return errors.Join(errs...)
}

func (l *gpuLoad) String() string {
	var taken int64
	for _, a := range l.agents {
		if v, err := a.view(); err == nil {
			taken += v.Taken
		}
	}
	return fmt.Sprintf("devices: %d registrations and %d stops accepted, %d without a clear answer, %d batch jobs seen to end; agents took %d allocations; "+
		"%d samples of the state with at most %d devices in use, %d of the agents", l.registered.Load(), l.stopped.Load(), l.unknowns.Load(), l.completed.Load(),
		taken, l.samples.Load(), l.most.Load(), l.views.Load())
}

// checkBlocked says whether what waits tells why.
func (r *region) checkBlocked() {
	r.t.Helper()
	var evals []struct {
		ID, JobID, StatusDescription string
		FailedTGAllocs               map[string]any
	}
	r.await("blocked evaluations are listed", func() bool {
		return r.get(0, "/v1/evaluations?consistent&filter="+url.QueryEscape(`Status == "blocked"`), &evals)
	})
	seen := false
	for _, e := range evals {
		if len(e.FailedTGAllocs) == 0 && e.StatusDescription == "" {
			r.t.Errorf("evaluation %s of %s is blocked without a reason", e.ID, e.JobID)
		}
		if e.JobID != tooLarge {
			r.t.Errorf("evaluation %s of %s is still blocked (%s, %v)", e.ID, e.JobID, e.StatusDescription, e.FailedTGAllocs)
		}
		seen = seen || e.JobID == tooLarge
	}
	if !seen {
		r.t.Errorf("%s, which fits nowhere, has no blocked evaluation", tooLarge)
	}
}

// TestDeviceHeldTwiceIsSeen makes sure that samples of the state can say no.
func TestDeviceHeldTwiceIsSeen(t *testing.T) {
	on := func(id string, devices ...string) (a allocStub) {
		text := fmt.Sprintf(`{"ID": %q, "AllocatedResources": {"Tasks": {"t": {"Devices": [{"DeviceIDs": ["%s"]}]}}}}`, id, strings.Join(devices, `", "`))
		if err := json.Unmarshal([]byte(text), &a); err != nil {
			t.Fatal(err)
		}
		return a
	}
	l := gpuLoad{doubles: map[string]bool{}}
	l.checkDevices([]allocStub{on("a", "gpu-0", "gpu-1"), on("b", "gpu-2")})
	if len(l.problems) > 0 || l.most.Load() != 3 {
		t.Errorf("apart: %v, %d devices", l.problems, l.most.Load())
	}
	l.checkDevices([]allocStub{on("a", "gpu-0", "gpu-1"), on("b", "gpu-1")})
	if len(l.problems) != 1 {
		t.Errorf("one device for two: %v", l.problems)
	}
}
