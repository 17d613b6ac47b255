package main

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/rxvision/rxvision/agent"
	"github.com/rxvision/rxvision/agent/gpu"
	"github.com/rxvision/rxvision/agent/spot"
	"github.com/rxvision/rxvision/pki"
)

func newAgent() *cobra.Command {
	var (
		c        agent.Config
		identity identityFlags
		meta     []string
		ort      string
		nvml     string
		notices  spot.Options
		logLevel string
	)
	cmd := &cobra.Command{
		Use:   "agent",
		Short: "Run an agent: own this host's GPUs and allocations",
		Long: `Runs the agent of this host. With --tls-ca it enrols with an introduction token
(rxvision node intro), keeps its certificate fresh by itself, and gives certificates
to the workers that it starts. Without servers it goes on with what it has: workers
stay reachable for at least two days.

SIGHUP reads the CA's file and the log level again.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, level, err := newLeveledLogger(cmd.ErrOrStderr(), logLevel)
			if err != nil {
				return err
			}
			c := c // the settings stay as they were given: a reload compares them
			c.Log, c.Metrics, c.Version = log, newMetrics(), version
			c.ORTLibrary = ortLibrary(ort)
			if dir, err := filepath.Abs(c.DataDir); err == nil {
				c.DataDir = dir
			}
			r := &reload{cmd: cmd, fresh: newAgent, log: log, apply: func(_, value string) error { return setLevel(level, value) }}
			if c.Region = identity.region; identity.tls() {
				c.Identity = func(nodeID, name string) (*pki.Holder, error) {
					id := pki.Identity{Role: pki.RoleNode, Region: identity.region, Name: nodeID}
					h, err := identity.holder(id, name, filepath.Join(c.DataDir, "identity"), c.Servers, 0, log, c.Metrics)
					if err == nil {
						r.more = []func() error{h.Material().Reload}
					}
					return h, err
				}
			}
			if nvml != "" {
				source, err := gpu.Open(gpu.Options{Library: nvml})
				if err != nil {
					return fmt.Errorf("--nvml-library %s: %w", nvml, err)
				}
				c.GPUs = source
			}
			if notices.Provider != "" {
				notices.Warn = func(err error) { log.Warn("the provider of this machine does not answer", "error", err) }
				if c.Notices, err = spot.Open(notices); err != nil {
					return err
				}
			}
			a, err := agent.New(cmd.Context(), c)
			if err != nil {
				return err
			}
			g, ctx := errgroup.WithContext(cmd.Context())
			g.Go(func() error { return r.run(ctx) })
			g.Go(func() error { return a.Run(ctx) })
			return g.Wait()
		},
	}
	f := cmd.Flags()
	f.StringVar(&c.DataDir, "data-dir", filepath.Join(defaultDataDir, "agent"), "folder of allocations, artifacts and the agent's memory")
	f.StringSliceVar(&c.Servers, "server", []string{defaultRPCAddr}, "host:port of a server's agent listener; may be given several times")
	f.StringVar(&c.Address, "address", agent.DefaultAddress, "IP address that tasks' ports are bound to and advertised at")
	identity.add(f)
	f.StringVar(&c.HTTPAddr, "http-addr", defaultAgentAddr, "address of metrics and health")
	f.StringVar(&c.Name, "name", "", "the node's name; default: the host's")
	f.StringVar(&c.Datacenter, "datacenter", agent.DefaultDatacenter, "the datacenter")
	f.StringVar(&c.NodePool, "node-pool", "default", "the node pool")
	f.StringVar(&c.NodeClass, "node-class", "", "the node class")
	f.StringArrayVar(&meta, "meta", nil, "KEY=VALUE node metadata for constraints; may be given several times")
	f.BoolVar(&c.RawExec, "raw-exec", false, "enable the raw_exec driver, which runs any command unisolated")
	f.BoolVar(&c.StopTasksOnExit, "stop-tasks-on-exit", false, "end all tasks when the agent is told to end; by default they run on")
	f.StringVar(&c.Cgroup, "cgroup", agent.DefaultCgroup, `cgroup v2 group that tasks live in; "none" for no cgroups`)
	f.StringVar(&ort, "ort-library", "", "ONNX Runtime library; default: lib/ beside the folder of this program")
	f.StringVar(&nvml, "nvml-library", "", "NVIDIA's management library; default: libnvidia-ml.so.1 where it usually is, none is fine")
	f.Int64Var(&c.CacheBytes, "artifact-cache-bytes", agent.DefaultCacheBytes, "bound of the artifact cache")
	f.BoolVar(&c.Spot, "spot", false, "this machine may be taken away at short notice: only jobs whose meta rx_spot allows it come here")
	f.StringVar(&notices.Provider, "spot-provider", "", "ask aws, gcp or azure, or a file, for notices of interruption, and whether this is a spot machine; default: nobody")
	f.StringVar(&notices.Endpoint, "spot-endpoint", "", "base URL of the provider's metadata service; default: the provider's own")
	f.StringVar(&notices.Path, "spot-file", "", "with --spot-provider file: the file that is the notice")
	f.StringSliceVar(&c.HealthCheckCommand, "health-check-command", nil, "program and arguments, run with one GPU visible before one that has failed is given to work again; it must end with 0")
	f.StringVar(&logLevel, "log-level", "info", "debug, info, warn or error")
	addConfig(cmd, func() error {
		plain := map[string]string{"http-addr": c.HTTPAddr}
		if !identity.tls() {
			plain["address"] = net.JoinHostPort(c.Address, "0") // of workers
		}
		faults := []error{identity.check(c.Servers), loopbackOnly(plain)}
		if notices.Provider != "" {
			_, err := spot.Open(notices)
			faults = append(faults, err)
		} else if notices.Endpoint != "" || notices.Path != "" {
			faults = append(faults, errors.New("--spot-endpoint and --spot-file go with --spot-provider"))
		}
		c.Meta = map[string]string{}
		for _, kv := range meta {
			k, v, ok := strings.Cut(kv, "=")
			if !ok || k == "" {
				faults = append(faults, fmt.Errorf("--meta %q: want KEY=VALUE", kv))
			}
			c.Meta[k] = v
		}
		return errors.Join(faults...)
	}, "log-level")
	return cmd
}
