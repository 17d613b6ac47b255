package task

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/rxvision/rxvision/blob"
	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/proc"
)

// DefaultPortLabel is the port that a worker listens on when config names none.
const DefaultPortLabel = "http"

// Bounds of a model check.
const (
	checkTimeout   = 2 * time.Minute
	checkMemory    = 8 << 30
	checkProcesses = 512
)

// onnxConfig is the config block of onnx. Model is resolved by the servers when
// the job is registered; the task's ModelRef says what to serve.
type onnxConfig struct {
	Model   string `json:"model"`
	Port    string `json:"port"`
	Threads int    `json:"threads"`
}

// onnx serves models in worker processes.
type onnx struct{ d *Drivers }

func (o *onnx) Fingerprint() *cluster.DriverInfo {
	if o.d.opts.ORTLibrary == "" {
		return undetected("no ONNX Runtime library is configured")
	}
	if _, err := os.Stat(o.d.opts.ORTLibrary); err != nil {
		return undetected("ONNX Runtime library: " + err.Error())
	}
	return o.d.healthy(DriverONNX)
}

func (o *onnx) Start(ctx context.Context, c *Config) (Handle, error) {
	cfg := onnxConfig{Port: DefaultPortLabel}
	if err := c.Env.Decode(c.Task.Config, &cfg); err != nil {
		return nil, err
	}
	address, err := c.address(cfg.Port)
	if err != nil {
		return nil, err
	}
	m := c.Task.Model
	if m == nil || m.Digest == "" {
		return nil, errors.New("the job names no registered model for this task")
	}
	c.notice("Fetching model %s version %d (%d bytes)", m.Name, m.Version, m.Size)
	path, release, err := o.d.model(ctx, m.Digest, m.Size)
	if err != nil {
		return nil, transient{fmt.Errorf("model %s version %d: %w", m.Name, m.Version, err)}
	}
	args := []string{"worker", "-model", m.Name, "-version", strconv.FormatUint(m.Version, 10), "-file", path, "-listen", address}
	if cfg.Threads > 0 {
		args = append(args, "-threads", strconv.Itoa(cfg.Threads))
	}
	if o.d.opts.WorkerTLS != nil {
		tls, err := o.d.opts.WorkerTLS.Certify(ctx, c.Alloc.ID, c.Dir.Secrets())
		if err != nil {
			release()
			return nil, transient{fmt.Errorf("certificate of the worker: %w", err)}
		}
		args = append(args, tls...)
	}
	spec := o.d.spec(c, o.d.executable(), args)
	spec.Env = o.d.workerEnv(spec.Env)
	s := c.state(DriverONNX)
	s.Digest, s.Size, s.Address, s.TLS = m.Digest, m.Size, address, o.d.opts.WorkerTLS != nil
	p, err := startProcess(spec, s, c.Keep, release)
	if err != nil {
		release()
	}
	return handle(p, err)
}

// Recover takes over a worker and holds its artifact in the cache again, in the
// background because that reads it once in full.
func (o *onnx) Recover(_ context.Context, s State) (Handle, error) {
	ctx, cancel := context.WithCancel(context.Background())
	pinned := make(chan func(), 1)
	p, err := recoverProcess(s, func() {
		cancel()
		(<-pinned)()
	})
	if err != nil || p.p == nil {
		cancel()
		return handle(p, err)
	}
	p.wg.Go(func() {
		_, release, err := o.d.model(ctx, s.Digest, s.Size)
		if err != nil {
			release = func() {} // it runs from what it has read already
		}
		pinned <- release
	})
	return p, nil
}

// address is where the worker listens: the allocation's port of that label.
func (c *Config) address(label string) (string, error) {
	if c.Alloc.AllocatedResources != nil {
		for _, p := range c.Alloc.AllocatedResources.Shared.Ports {
			if p.Label == label {
				ip := p.HostIP
				if ip == "" {
					ip = "127.0.0.1"
				}
				return net.JoinHostPort(ip, strconv.Itoa(p.Value)), nil
			}
		}
	}
	return "", fmt.Errorf("config: the group has no port %q", label)
}

// A fetch that breaks off is tried again, from where it broke off.
const (
	fetchAttempts = 4
	fetchDelay    = 500 * time.Millisecond // doubled each time
)

// model brings an artifact into the cache and holds it there until release.
func (d *Drivers) model(ctx context.Context, digest string, size int64) (path string, release func(), err error) {
	if d.opts.Cache == nil {
		return "", nil, errors.New("this node has no artifact cache")
	}
	sum, err := blob.ParseDigest(digest)
	if err != nil {
		return "", nil, err
	}
	for i, delay := 1, fetchDelay; ; i, delay = i+1, 2*delay {
		path, release, err = d.opts.Cache.Get(ctx, sum, size, d.opts.Fetch)
		if err == nil || i == fetchAttempts || ctx.Err() != nil ||
			errors.Is(err, blob.ErrTooLarge) || errors.Is(err, blob.ErrCacheFull) || errors.Is(err, blob.ErrNoSpace) {
			return path, release, err
		}
		select {
		case <-ctx.Done():
			return "", nil, err
		case <-time.After(delay):
		}
	}
}

func (d *Drivers) executable() string {
	if d.opts.Executable != "" {
		return d.opts.Executable
	}
	const self = "/proc/self/exe"
	if real, err := filepath.EvalSymlinks(self); err == nil {
		return real
	}
	return self // its file was replaced by an upgrade
}

// workerEnv makes the environment of a worker. What could make it load foreign
// code is the operator's to set, not the job's.
func (d *Drivers) workerEnv(env []string) []string {
	out := make([]string, 0, len(env)+len(d.opts.WorkerEnv)+2)
	for _, kv := range env {
		if !strings.HasPrefix(kv, "LD_") && !strings.HasPrefix(kv, "RXVISION_") && !strings.HasPrefix(kv, "ORT_") {
			out = append(out, kv)
		}
	}
	out = append(out, d.opts.WorkerEnv...)
	return append(out, "RXVISION_ORT_LIBRARY="+d.opts.ORTLibrary, "ORT_DISABLE_TELEMETRY=1")
}

// readable reports whether every user of the host can read these files, by the
// way that leads to them: what an isolated process, which is nobody, needs.
func readable(paths ...string) bool {
	for _, path := range paths {
		real, err := filepath.EvalSymlinks(path)
		if err != nil {
			return false
		}
		need := os.FileMode(0o004)
		for at := real; at != "/"; at = filepath.Dir(at) {
			fi, err := os.Stat(at)
			if err != nil || fi.Mode().Perm()&need != need {
				return false
			}
			need = 0o001
		}
	}
	return true
}

// CheckModel loads an artifact in a worker process with limits, without network
// and isolated where the host allows it, and returns what the model says of
// itself: platform, inputs, outputs, properties. The error is a cluster.Error;
// CodeInvalid means that the model is at fault.
func (d *Drivers) CheckModel(ctx context.Context, digest string, size int64) (*cluster.ModelVersion, error) {
	path, release, err := d.model(ctx, digest, size)
	if err != nil {
		return nil, cluster.Errorf(cluster.CodeUnavailable, "fetch the model to check it: %v", err)
	}
	defer release()
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	spec := proc.Spec{
		Path: d.executable(), Args: []string{"worker", "-check", "-file", path},
		Env:       d.workerEnv([]string{"PATH=" + os.Getenv("PATH"), "CUDA_VISIBLE_DEVICES=-1", "NVIDIA_VISIBLE_DEVICES=none"}),
		Rlimits:   proc.Rlimits{CPUSeconds: uint64(checkTimeout / time.Second), FileBytes: 64 << 20},
		NoNetwork: d.host.NoNetwork,
	}
	if parts := []string{path, spec.Path, d.opts.ORTLibrary}; d.host.Isolation && readable(parts...) {
		spec.Isolation = &proc.Isolation{Hidden: d.opts.Hidden, ReadOnly: parts}
	}
	if d.host.Limits {
		spec.Cgroup = d.cgroup("check-"+strings.TrimPrefix(digest, "sha256:")[:16], strconv.FormatInt(time.Now().UnixNano(), 36))
		spec.Limits = proc.Limits{MemoryBytes: checkMemory, PIDs: checkProcesses}
	}
	out, err := proc.Output(ctx, spec)
	var answer struct {
		Error      string               `json:"error"`
		Platform   string               `json:"platform"`
		Inputs     []cluster.TensorSpec `json:"inputs"`
		Outputs    []cluster.TensorSpec `json:"outputs"`
		Properties map[string]string    `json:"properties"`
	}
	decodeErr := json.Unmarshal(out, &answer)
	switch {
	case decodeErr == nil && answer.Error != "":
		return nil, cluster.Errorf(cluster.CodeInvalid, "%s", answer.Error)
	case ctx.Err() != nil:
		return nil, cluster.Errorf(cluster.CodeInvalid, "the model did not load within %s", checkTimeout)
	case err != nil:
		return nil, cluster.Errorf(cluster.CodeInvalid, "the model could not be loaded: %v", err)
	case decodeErr != nil:
		return nil, cluster.Errorf(cluster.CodeInternal, "the check answered something that is not JSON: %v", decodeErr)
	}
	return &cluster.ModelVersion{
		Digest: digest, Size: size, Platform: answer.Platform,
		Inputs: answer.Inputs, Outputs: answer.Outputs, Properties: answer.Properties,
	}, nil
}
