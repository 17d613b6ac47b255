package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/rxvision/rxvision/oip"
	"github.com/rxvision/rxvision/pki"
	"github.com/rxvision/rxvision/serve"
)

// ortLibrary finds ONNX Runtime's library: the user's choice, else lib/ beside
// the folder of this program, else the name for the loader to find.
func ortLibrary(chosen string) string {
	if chosen != "" {
		return chosen
	}
	if self, err := os.Executable(); err == nil {
		for _, p := range []string{"../lib/libonnxruntime.so.1", "lib/libonnxruntime.so.1", "libonnxruntime.so.1"} {
			if path := filepath.Join(filepath.Dir(self), p); fileExists(path) {
				return path
			}
		}
	}
	return "libonnxruntime.so.1"
}

func fileExists(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

func newWorker() *cobra.Command {
	var (
		c        serve.Config
		identity workerIdentity
		check    bool
		logLevel string
	)
	cmd := &cobra.Command{
		Use:   "worker",
		Short: "Serve one ONNX model over the Open Inference Protocol",
		Long: `Serves one ONNX model. Agents start workers for tasks of the onnx driver; it can be
run by hand too. With --check it loads the model, runs it once, prints what it
read as JSON and exits with 0, or with 3 and {"error": …}.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c.Library, c.Release = ortLibrary(c.Library), version
			if check {
				m, err := serve.Check(cmd.Context(), c.Path, c.Library)
				if err != nil {
					// Whoever asked knows the file; a node's name for it would mean nothing to who pushed it.
					why := strings.TrimPrefix(err.Error(), filepath.Base(c.Path)+": ")
					if err := json.NewEncoder(cmd.OutOrStdout()).Encode(oip.ErrorResponse{Error: why}); err != nil {
						return err
					}
					return exitCode(exitInvalid)
				}
				return json.NewEncoder(cmd.OutOrStdout()).Encode(m)
			}
			log, err := newLogger(cmd.ErrOrStderr(), logLevel)
			if err != nil {
				return err
			}
			reg := newMetrics()
			m, err := identity.open(log, reg)
			if err != nil {
				return err
			}
			scheme := "http"
			if m == nil {
				if err := loopbackOnly(map[string]string{"listen": c.Listen}); err != nil {
					return err
				}
			} else {
				scheme, c.TLS = "https", m.Server(identity.callers())
			}
			if c.Model == "" {
				c.Model = baseName(c.Path)
			}
			g, ctx := errgroup.WithContext(cmd.Context())
			ctx, cancel := context.WithCancel(ctx)
			defer cancel()
			if m != nil {
				g.Go(func() error { return m.Run(ctx) })
			}
			g.Go(func() error {
				defer cancel()
				return serve.Run(ctx, c, log, reg, func(addr string) {
					fmt.Fprintf(cmd.OutOrStdout(), "serving %s on %s://%s/v2/models/%s\n", c.Path, scheme, addr, c.Model)
				})
			})
			return g.Wait()
		},
	}
	f := cmd.Flags()
	f.StringVar(&c.Path, "file", "", "the ONNX file")
	f.StringVar(&c.Model, "model", "", "the model's name in URLs; default: the file's name")
	f.StringVar(&c.Version, "version", "1", "the version in URLs")
	f.StringVar(&c.Listen, "listen", "127.0.0.1:8000", "host:port; port 0 takes any free one")
	f.StringVar(&identity.ca, "tls-ca", "", "PEM file of the region's CA: speak TLS with gateways and this node's agent, and nobody else")
	f.StringVar(&identity.cert, "tls-cert", "", "PEM file of the worker's certificate")
	f.StringVar(&identity.key, "tls-key", "", "PEM file of its key")
	f.StringVar(&identity.node, "tls-node", "", "ID of the node whose agent may call")
	f.StringVar(&c.Library, "ort-library", "", "ONNX Runtime library; default: lib/ beside the folder of this program")
	f.IntVar(&c.Threads, "threads", 0, "threads of one run; default 1")
	f.IntVar(&c.MaxConcurrent, "max-concurrent", 0, "runs at once; default: processors / threads")
	f.IntVar(&c.MaxQueue, "max-queue", 0, "requests that wait for a run; default 256")
	f.Int64Var(&c.MaxBody, "max-body-bytes", 0, "largest request body; default 64 MiB")
	f.DurationVar(&c.DrainDelay, "drain-delay", 0, "how long requests are still taken after the worker was told to end")
	f.BoolVar(&check, "check", false, "load the model, print what it is, and exit")
	f.StringVar(&logLevel, "log-level", "info", "debug, info, warn or error")
	return cmd
}

// baseName is a file's name without folder and extension.
func baseName(path string) string {
	b := filepath.Base(path)
	return b[:len(b)-len(filepath.Ext(b))]
}

// workerIdentity says who a worker is and who may call it.
type workerIdentity struct{ ca, cert, key, node string }

// nodeGrace is how long after its end a node's certificate still opens the workers
// on that node: while no server is there to renew it, its agent shall not take them
// for dead.
const nodeGrace = pki.DefaultGrace

// open reads the worker's certificate, nil without TLS.
func (w *workerIdentity) open(log *slog.Logger, reg prometheus.Registerer) (*pki.Material, error) {
	if w.ca+w.cert+w.key+w.node == "" {
		return nil, nil
	}
	if w.node == "" {
		return nil, errors.New("--tls-node is missing: the node whose agent may call")
	}
	return pki.Load(pki.Config{CA: w.ca, Cert: w.cert, Key: w.key, Role: pki.RoleWorker, Use: "wire", Logger: log, Registerer: reg})
}

// callers are the region's gateways and the worker's own agent.
func (w *workerIdentity) callers() pki.Peers {
	return pki.Peers{
		Roles: []pki.Role{pki.RoleGateway, pki.RoleNode},
		Is: func(id pki.Identity) error {
			if id.Role == pki.RoleNode && id.Name != w.node {
				return fmt.Errorf("it is %s, but this worker belongs to node %s", id, w.node)
			}
			return nil
		},
		Grace: map[pki.Role]time.Duration{pki.RoleNode: nodeGrace},
	}
}
