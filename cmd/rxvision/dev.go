package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/rxvision/rxvision/agent"
	"github.com/rxvision/rxvision/proc"
)

// devConfig is the configuration of one machine that runs everything.
type devConfig struct {
	dataDir                                 string
	http, rpc, raft, agentHTTP, gatewayAddr string
	ortLibrary, nvmlLibrary, logLevel       string
	demo                                    bool
	demoDir                                 string
	stop                                    bool
}

func newDev() *cobra.Command {
	var c devConfig
	cmd := &cobra.Command{
		Use:   "dev",
		Short: "Run the whole platform on this machine",
		Long: `Starts server, agent and gateway as processes of their own and starts them anew
when they die. Ctrl-C ends everything; jobs, models and history are there again
at the next start. If dev itself is killed its processes run on; the next
start takes them over, and ` + "`rxvision dev --stop`" + ` ends them.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			dir, err := filepath.Abs(c.dataDir)
			if err != nil {
				return err
			}
			c.dataDir = dir
			if c.stop {
				return stopDev(cmd.Context(), c, cmd.OutOrStdout())
			}
			return runDev(cmd.Context(), c, cmd.OutOrStdout())
		},
	}
	f := cmd.Flags()
	f.StringVar(&c.dataDir, "data-dir", defaultDataDir, "folder of everything that is kept")
	f.StringVar(&c.http, "http-addr", defaultHTTPAddr, "address of the HTTP API (NOMAD_ADDR)")
	f.StringVar(&c.rpc, "rpc-addr", defaultRPCAddr, "address that agents and gateways dial")
	f.StringVar(&c.raft, "raft-addr", defaultRaftAddr, "address of the replicated log")
	f.StringVar(&c.agentHTTP, "agent-http-addr", defaultAgentAddr, "address of the agent's metrics and health")
	f.StringVar(&c.gatewayAddr, "gateway-addr", defaultGatewayAddr, "address of the inference API")
	f.StringVar(&c.ortLibrary, "ort-library", "", "ONNX Runtime library; default: lib/ beside the folder of this program")
	f.StringVar(&c.nvmlLibrary, "nvml-library", "", "NVIDIA's management library; default: where it usually is, none is fine")
	f.StringVar(&c.logLevel, "log-level", "info", "debug, info, warn or error")
	f.BoolVar(&c.demo, "demo", false, "push the sample model, run the job fashion and classify ten images")
	f.StringVar(&c.demoDir, "demo-dir", ".", "the project's folder, where the demonstration finds its files")
	f.BoolVar(&c.stop, "stop", false, "end what runs on this data folder, then exit")
	return cmd
}

// devChild is one process of dev. It is noted on disk before it starts, so that
// the next supervisor looks for it; proc keeps who it is beside its status file.
type devChild struct {
	Name   string
	Args   []string
	Binary string // path and modification time of the program it runs
}

// supervisor runs the children.
type supervisor struct {
	cfg    devConfig
	out    io.Writer
	binary string // of this program
	self   string // path
	mu     sync.Mutex
	kids   map[string]devChild
}

// children lists the processes in the order in which they start.
func (c devConfig) children() []devChild {
	common := []string{"--log-level", c.logLevel}
	node := append([]string{
		"agent", "--data-dir", filepath.Join(c.dataDir, "agent"), "--server", c.rpc,
		"--http-addr", c.agentHTTP, "--raw-exec", "--stop-tasks-on-exit",
	}, common...)
	if c.ortLibrary != "" {
		node = append(node, "--ort-library", c.ortLibrary)
	}
	if c.nvmlLibrary != "" {
		node = append(node, "--nvml-library", c.nvmlLibrary)
	}
	return []devChild{
		{Name: "server", Args: append([]string{
			"server", "--dev", "--data-dir", filepath.Join(c.dataDir, "server"),
			"--http-addr", c.http, "--rpc-addr", c.rpc, "--raft-addr", c.raft,
		}, common...)},
		{Name: "agent", Args: node},
		{Name: "gateway", Args: append([]string{"gateway", "--data-dir", filepath.Join(c.dataDir, "gateway"), "--server", c.rpc, "--http-addr", c.gatewayAddr}, common...)},
	}
}

// ports are the addresses that the children listen on, by the flag that sets them.
func (c devConfig) ports(child string) map[string]string {
	switch child {
	case "server":
		return map[string]string{"http-addr": c.http, "rpc-addr": c.rpc, "raft-addr": c.raft}
	case "agent":
		return map[string]string{"agent-http-addr": c.agentHTTP}
	}
	return map[string]string{"gateway-addr": c.gatewayAddr}
}

func runDev(ctx context.Context, cfg devConfig, out io.Writer) error {
	started := time.Now()
	all := map[string]string{}
	for _, k := range cfg.children() {
		for flag, addr := range cfg.ports(k.Name) {
			all[flag] = addr
		}
	}
	if err := loopbackOnly(all); err != nil {
		return err
	}
	if cfg.demo {
		if err := checkDemoFiles(cfg.demoDir); err != nil {
			return err
		}
	}
	unlock, err := lockDev(cfg.dataDir)
	if err != nil {
		return err
	}
	defer unlock()
	// Who reads our output may end first, as tee does at a Ctrl-C: that must not
	// end us before our children.
	pipe := make(chan os.Signal, 1)
	signal.Notify(pipe, syscall.SIGPIPE)
	defer signal.Stop(pipe)
	s, err := newSupervisor(cfg, out)
	if err != nil {
		return err
	}
	running, err := s.adopt(ctx)
	if err != nil {
		return err
	}
	var taken []error
	for _, k := range cfg.children() {
		if running[k.Name] != nil {
			continue
		}
		ports := cfg.ports(k.Name)
		for _, flag := range sortedKeys(ports) {
			if err := portFree(flag, ports[flag]); err != nil {
				taken = append(taken, err)
			}
		}
	}
	if taken != nil {
		for _, p := range running {
			p.Detach()
		}
		return errors.Join(taken...)
	}

	work, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	fmt.Fprintf(out, "rxvision %s: data in %s, logs in %s\n", version, cfg.dataDir, filepath.Join(cfg.dataDir, "dev"))
	keepers := map[string]func(){}
	for _, k := range cfg.children() {
		keepCtx, stop := context.WithCancel(context.WithoutCancel(ctx))
		done := make(chan struct{})
		keepers[k.Name] = func() { stop(); <-done }
		go func() {
			defer close(done)
			if err := s.keep(keepCtx, k, running[k.Name]); err != nil {
				cancel(err)
			}
		}()
	}
	err = s.serve(work, started)
	if cause := context.Cause(work); err == nil || errors.Is(err, context.Canceled) {
		err = cause
	}
	if err != nil && !errors.Is(err, context.Canceled) {
		fmt.Fprintf(out, "stopping: %v\n", err)
	} else {
		fmt.Fprintln(out, "stopping: jobs, models and history stay in", cfg.dataDir)
		err = nil
	}
	for _, name := range []string{"gateway", "agent", "server"} {
		keepers[name]()
	}
	return err
}

// serve waits until all is up, tells so, runs the demonstration, and stays.
func (s *supervisor) serve(ctx context.Context, started time.Time) error {
	if err := s.awaitReady(ctx); err != nil {
		return err
	}
	fmt.Fprintf(s.out, "ready after %.1f s: server, agent and gateway are up\n", time.Since(started).Seconds())
	if s.cfg.demo {
		if err := runDemo(ctx, s.cfg, started, s.out); err != nil {
			return fmt.Errorf("demonstration: %w", err)
		}
	}
	s.printAddresses()
	<-ctx.Done()
	return nil
}

func (s *supervisor) printAddresses() {
	c := s.cfg
	fmt.Fprintf(s.out, `
  HTTP API (Nomad's dialect)  http://%s
  inference API               http://%s
  agent metrics               http://%s/metrics

Try:
  NOMAD_ADDR=http://%s nomad job status
  curl --data-binary @testdata/fashion/%s http://%s/v1/models/fashion/classify
  %s job run jobs/examples/hello.nomad.hcl

Ctrl-C ends everything.
`, c.http, c.gatewayAddr, c.agentHTTP, c.http, sampleImage(c.demoDir), c.gatewayAddr, shortSelf(s.self))
}

// shortSelf is how the user can call this program from where they are.
func shortSelf(self string) string {
	if wd, err := os.Getwd(); err == nil {
		if rel, err := filepath.Rel(wd, self); err == nil && !strings.HasPrefix(rel, "..") {
			return rel
		}
	}
	return self
}

// awaitReady waits until the server leads, the node is ready and the gateway
// has routes.
func (s *supervisor) awaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	c := s.cfg
	for _, check := range []struct {
		what, url string
		ok        func([]byte) bool
	}{
		{"server", "http://" + c.http + "/v1/status/leader", func(b []byte) bool { return strings.Contains(string(b), ":") }},
		{"agent", "http://" + c.agentHTTP + "/health", func(b []byte) bool { return strings.Contains(string(b), `"message":"ok"`) }}, // attached to the server
		{"gateway", "http://" + c.gatewayAddr + "/v2/health/ready", func([]byte) bool { return true }},
	} {
		for {
			b, err := httpGet(ctx, check.url)
			if err == nil && check.ok(b) {
				break
			}
			select {
			case <-time.After(25 * time.Millisecond):
			case <-ctx.Done():
				if cause := context.Cause(ctx); !errors.Is(cause, context.DeadlineExceeded) {
					return cause
				}
				return fmt.Errorf("the %s is not up after a minute (%w); its log: %s", check.what, err, s.logPath(check.what))
			}
		}
	}
	return nil
}

// httpGet reads a small answer with status 200.
func httpGet(ctx context.Context, url string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s answered %s: %s", url, resp.Status, strings.TrimSpace(string(b)))
	}
	return b, err
}

func newSupervisor(cfg devConfig, out io.Writer) (*supervisor, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	info, err := os.Stat(self)
	if err != nil {
		return nil, err
	}
	s := &supervisor{
		cfg: cfg, out: out, self: self, kids: map[string]devChild{},
		binary: self + "@" + strconv.FormatInt(info.ModTime().UnixNano(), 10),
	}
	if err := os.MkdirAll(s.dir(), 0o700); err != nil {
		return nil, err
	}
	b, err := os.ReadFile(s.childrenFile())
	switch {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return nil, err
	default:
		if err := json.Unmarshal(b, &s.kids); err != nil {
			return nil, fmt.Errorf("%s is damaged (%w): end what still runs by hand, then remove the file", s.childrenFile(), err)
		}
	}
	return s, nil
}

func (s *supervisor) dir() string          { return filepath.Join(s.cfg.dataDir, "dev") }
func (s *supervisor) childrenFile() string { return filepath.Join(s.dir(), "children.json") }
func (s *supervisor) logPath(child string) string {
	return filepath.Join(s.dir(), child+".stderr.0")
}

func (s *supervisor) statusFile(child string) string {
	return filepath.Join(s.dir(), child+".status")
}

// note records a child, or forgets it.
func (s *supervisor) note(name string, k *devChild) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if k == nil {
		delete(s.kids, name)
	} else {
		s.kids[name] = *k
	}
	b, err := json.Marshal(s.kids)
	if err != nil {
		return err
	}
	tmp := s.childrenFile() + ".new"
	if err := writeSynced(tmp, b); err != nil {
		if k == nil {
			return nil // a full disk must not keep anything from ending; the next start looks for it in vain
		}
		return err
	}
	return os.Rename(tmp, s.childrenFile())
}

// writeSynced writes a file that is whole after a power cut.
func writeSynced(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Sync(), f.Close())
}

// attach finds a child's process, also when the supervisor was killed while it
// started it. The error is proc.ErrGone when it does not run.
func (s *supervisor) attach(ctx context.Context, name string) (*proc.Process, error) {
	id, err := proc.Find(ctx, s.statusFile(name))
	if errors.Is(err, proc.ErrNotStarted) {
		return nil, proc.ErrGone
	}
	if err != nil {
		return nil, err
	}
	return proc.Attach(id)
}

// adopt finds the children of an earlier supervisor that still run. Those that
// run another program or with other arguments are ended, to be started anew.
func (s *supervisor) adopt(ctx context.Context) (map[string]*proc.Process, error) {
	running := map[string]*proc.Process{}
	for _, want := range s.cfg.children() {
		k, ok := s.kids[want.Name]
		if !ok {
			continue
		}
		p, err := s.attach(ctx, k.Name)
		if errors.Is(err, proc.ErrGone) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if k.Binary == s.binary && slices.Equal(k.Args, want.Args) {
			fmt.Fprintf(s.out, "taking over the running %s (pid %d)\n", k.Name, p.Identity().TaskPID)
			running[k.Name] = p
			continue
		}
		// Without SIGTERM's courtesy for its tasks: the new agent takes them over.
		sig := syscall.SIGTERM
		if k.Name == "agent" {
			sig = syscall.SIGKILL
		}
		_, err = p.Stop(ctx, sig, stopGrace)
		p.Detach()
		if err != nil {
			return nil, err
		}
	}
	return running, nil
}

const (
	stopGrace   = 20 * time.Second
	agentGrace  = agent.MaxKillTimeout + stopGrace // its tasks may take their kill_timeout
	tellAfter   = 3 * time.Second                  // of waiting for a child's end
	restartMin  = 200 * time.Millisecond
	restartMax  = 5 * time.Second
	restartsMax = 8 // in a row, each within healthyAfter: then dev gives up
	// healthyAfter is how long a child must live for its next death to count as the first.
	healthyAfter = 10 * time.Second
)

// keep runs one child until ctx ends, then stops it and waits for it.
func (s *supervisor) keep(ctx context.Context, k devChild, p *proc.Process) error {
	delay, deaths := restartMin, 0
	for {
		var lived time.Duration
		how := ""
		if p == nil {
			var err error
			if p, err = s.start(k); err != nil { // it may have been killed before it was up
				how = fmt.Sprintf("was not started: %v", err)
			}
		}
		if p != nil {
			began := time.Now()
			status, err := p.Wait(ctx)
			if ctx.Err() != nil {
				return s.end(ctx, k.Name, p)
			}
			p.Detach()
			p = nil
			if err != nil {
				return fmt.Errorf("%s: %w", k.Name, err)
			}
			how, lived = fmt.Sprintf("ended with %s", status), time.Since(began)
		}
		if deaths++; lived > healthyAfter {
			delay, deaths = restartMin, 1
		}
		if deaths >= restartsMax {
			return fmt.Errorf("the %s %s, for the %d. time in a row: %s", k.Name, how, deaths, lastLine(s.logPath(k.Name)))
		}
		fmt.Fprintf(s.out, "the %s %s; starting it again in %s\n", k.Name, how, delay)
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return s.note(k.Name, nil)
		}
		delay = min(2*delay, restartMax)
	}
}

// end stops a child and forgets it. A second Ctrl-C does not cut it short: an
// agent that is killed leaves its tasks behind.
func (s *supervisor) end(ctx context.Context, name string, p *proc.Process) error {
	grace := stopGrace
	if name == "agent" {
		grace = agentGrace
	}
	slow := time.AfterFunc(tellAfter, func() { fmt.Fprintf(s.out, "waiting for the %s to end\n", name) })
	_, err := p.Stop(context.WithoutCancel(ctx), syscall.SIGTERM, grace)
	slow.Stop()
	p.Detach()
	return errors.Join(err, s.note(name, nil))
}

func (s *supervisor) start(k devChild) (*proc.Process, error) {
	k.Binary = s.binary
	if err := s.note(k.Name, &k); err != nil {
		return nil, err
	}
	return proc.Start(proc.Spec{
		Path: s.self, Args: k.Args, Env: os.Environ(), Dir: s.dir(),
		Stdout:     proc.LogFiles{Dir: s.dir(), Name: k.Name + ".stdout", MaxFiles: 3},
		Stderr:     proc.LogFiles{Dir: s.dir(), Name: k.Name + ".stderr", MaxFiles: 3},
		StatusFile: s.statusFile(k.Name),
		// The agent's tasks outlive it; the next agent takes them over.
		LeaveOrphans: k.Name == "agent",
	})
}

// lastLine gives the end of a log for an error message.
func lastLine(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return "no log"
	}
	defer f.Close()
	const tail = 4096
	if info, err := f.Stat(); err == nil && info.Size() > tail {
		if _, err := f.Seek(-tail, io.SeekEnd); err != nil {
			return "no log"
		}
	}
	b, err := io.ReadAll(io.LimitReader(f, tail))
	if err != nil {
		return "no log"
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return lines[len(lines)-1]
}

// errHeld says that another process works on the data folder.
var errHeld = errors.New("end it with `rxvision dev --stop`, or choose another folder with --data-dir")

// lockDev makes sure that one supervisor runs on a data folder. The lock file
// holds its pid.
func lockDev(dataDir string) (unlock func(), err error) {
	if err := os.MkdirAll(dataDir, 0o700); err != nil {
		return nil, fmt.Errorf("data folder: %w", err)
	}
	path := filepath.Join(dataDir, "dev.lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("data folder: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		pid, _ := io.ReadAll(io.LimitReader(f, 32))
		f.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		return nil, fmt.Errorf("another `rxvision dev` (pid %s) runs on %s: %w", strings.TrimSpace(string(pid)), dataDir, errHeld)
	}
	if err := errors.Join(f.Truncate(0), writeAt(f, strconv.Itoa(os.Getpid()))); err != nil {
		f.Close()
		return nil, fmt.Errorf("data folder: %w", err)
	}
	return func() { f.Close() }, nil
}

func writeAt(f *os.File, s string) error {
	_, err := f.WriteAt([]byte(s), 0)
	return err
}

// stopDev ends the supervisor of a data folder, then what it left, if it was
// killed.
func stopDev(ctx context.Context, cfg devConfig, out io.Writer) error {
	path := filepath.Join(cfg.dataDir, "dev.lock")
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		fmt.Fprintln(out, "nothing runs on", cfg.dataDir)
		return nil
	}
	told := 0 // the pid that was asked to end
	unlock, err := lockDev(cfg.dataDir)
	for errors.Is(err, errHeld) {
		if told, err = askToEnd(path, told); err != nil {
			return err
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
		unlock, err = lockDev(cfg.dataDir)
	}
	if err != nil {
		return err
	}
	defer unlock()
	s, err := newSupervisor(cfg, out)
	if err != nil {
		return err
	}
	stopped := 0
	for _, name := range []string{"gateway", "agent", "server"} {
		k, ok := s.kids[name]
		if !ok {
			continue
		}
		p, err := s.attach(ctx, name)
		var late error
		if errors.Is(err, proc.ErrGone) && name == "agent" {
			// It may have left tasks: a new one takes them over and ends them with itself.
			if p, err = s.start(devChild{Name: name, Args: k.Args}); err == nil {
				late = s.awaitAgent(ctx, k.Args)
			}
		}
		if errors.Is(err, proc.ErrGone) {
			continue
		}
		if err != nil {
			return err
		}
		if err := errors.Join(late, s.end(ctx, name, p)); err != nil {
			return err
		}
		stopped++
	}
	if told != 0 && stopped == 0 {
		fmt.Fprintln(out, "stopped")
		return nil
	}
	fmt.Fprintf(out, "stopped %d processes that an earlier dev had left\n", stopped)
	return nil
}

// askToEnd signals the process that holds the lock file, once; told is the pid
// that was asked before. The file is empty while a supervisor that has just begun
// writes it, and holds the pid of none when it has just ended.
func askToEnd(path string, told int) (int, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return told, err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid <= 0 || pid == told {
		return told, nil
	}
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil && !errors.Is(err, syscall.ESRCH) {
		return told, fmt.Errorf("signal the supervisor (pid %d): %w", pid, err)
	}
	return pid, nil
}

// awaitAgent waits until an agent that was started with args answers, having
// found its tasks again.
func (s *supervisor) awaitAgent(ctx context.Context, args []string) error {
	addr := s.cfg.agentHTTP
	if i := slices.Index(args, "--http-addr"); i >= 0 && i+1 < len(args) {
		addr = args[i+1] // the dev that is ended may have had others than we
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		if _, err := httpGet(ctx, "http://"+addr+"/health"); err == nil {
			return nil
		}
		select {
		case <-time.After(25 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("the agent does not answer on %s; its log: %s", addr, s.logPath("agent"))
		}
	}
}
