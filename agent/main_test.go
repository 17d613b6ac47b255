package agent

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"go.uber.org/goleak"

	"github.com/rxvision/rxvision/proc"
)

// The test binary is also the programs that the tests need: a model server
// ("worker") and an agent to be killed ("agent-child").
func TestMain(m *testing.M) {
	proc.Main()
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "worker":
			os.Exit(fakeWorker(os.Args[2:]))
		case "agent-child":
			os.Exit(agentChild(os.Args[2]))
		}
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		for _, mount := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
			_ = os.Remove(filepath.Join(mount, testCgroup)) // stays if a test left something in it
		}
		os.Exit(code)
	}))
}

// testCgroup is where the tasks of this test process live, apart from those of
// others on the machine.
var testCgroup = fmt.Sprintf("rxvision-test-%d.slice", os.Getpid())

func flagValue(args []string, name string) string {
	if i := slices.Index(args, name); i >= 0 && i+1 < len(args) {
		return args[i+1]
	}
	return ""
}

// fakeWorker plays a model server. Its model file says how: "crash" ends it by
// a segmentation fault at once, "never" is never ready; POST /unready, /ready and
// /crash change it while it serves.
func fakeWorker(args []string) int {
	model, err := os.ReadFile(flagValue(args, "-file"))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if slices.Contains(args, "-check") {
		if text, ok := strings.CutPrefix(string(model), "refuse:"); ok {
			_ = json.NewEncoder(os.Stdout).Encode(map[string]string{"error": text})
			return 3
		}
		fmt.Println(`{"platform":"onnxruntime_onnx","inputs":[{"name":"x","datatype":"FP32","shape":[-1,4]}],"outputs":[],"properties":{"k":"v"}}`)
		return 0
	}
	crash := func() { // as a Go program that crashes in C does: the runtime reports it and exits with 2
		_ = syscall.Kill(os.Getpid(), syscall.SIGSEGV)
		select {}
	}
	var unready atomic.Bool
	switch string(model) {
	case "crash": // as any other program does
		_ = syscall.Exec("/bin/sh", []string{"sh", "-c", "kill -SEGV $$"}, nil)
	case "never":
		unready.Store(true)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v2/health/ready", func(w http.ResponseWriter, _ *http.Request) {
		if unready.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	})
	mux.HandleFunc("GET /model", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write(model)
	})
	mux.HandleFunc("POST /unready", func(http.ResponseWriter, *http.Request) { unready.Store(true) })
	mux.HandleFunc("POST /ready", func(http.ResponseWriter, *http.Request) { unready.Store(false) })
	mux.HandleFunc("POST /crash", func(http.ResponseWriter, *http.Request) { crash() })
	if flagValue(args, "-tls-cert") != "" {
		fmt.Fprintln(os.Stderr, serveTLS(args, mux))
		return 1
	}
	fmt.Fprintln(os.Stderr, http.ListenAndServe(flagValue(args, "-listen"), mux))
	return 1
}
