package e2e

import (
	"bytes"
	"compress/gzip"
	"compress/zlib"
	bits "encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/rxvision/rxvision/serve/ort/onnxtest"
)

// TestBadInput sends one platform what careless and hostile users send. Each gets
// one clear sentence and changes nothing.
func TestBadInput(t *testing.T) {
	nomadBinary(t)
	p := newPlatform(t)
	p.start()
	p.serveFashion()
	for _, part := range []struct {
		name string
		run  func(*testing.T, *platform)
	}{
		{"jobs", badJobs},
		{"models", badModels},
		{"tensors", badTensors},
		{"images", badImages},
		{"API", badCalls},
		{"files", badFiles},
		{"snapshots", badSnapshots},
		{"slow", slowClients},
		{"commands", badCommands},
	} {
		t.Run(part.name, func(t *testing.T) {
			before := p.everything(t)
			part.run(t, p)
			if after := p.everything(t); after != before {
				t.Errorf("the state was\n%s\nand is\n%s", before, after)
			}
			classify(t, p)
		})
	}
	t.Run("registrations", func(t *testing.T) { sameRegistration(t, p) })
}

// everything is what bad input must not change: jobs, models, indexes, and the
// files of models on the server's disk.
func (p *platform) everything(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	for _, path := range []string{"/v1/jobs", "/v1/models", "/v1/evaluations", "/v1/allocations", "/v1/deployments"} {
		resp, err := http.Get(p.http() + path)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != 200 {
			t.Fatalf("GET %s: %s %v", path, resp.Status, err)
		}
		fmt.Fprintf(&b, "%s index %s: %s\n", path, resp.Header.Get("X-Nomad-Index"), body)
	}
	err := filepath.WalkDir(filepath.Join(p.data, "server/blobs"), func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			b.WriteString(path + "\n")
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// classify asks for an answer, so that each part leaves a platform that works.
func classify(t *testing.T, p *platform) {
	t.Helper()
	code, text, err := send("POST", p.gateway()+"/v1/models/fashion/classify", nil, bytes.NewReader(sampleImage(t)))
	if err != nil || code != 200 {
		t.Errorf("classify: %d %s %v", code, text, err)
	}
}

func sampleImage(t *testing.T) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, "testdata/fashion/0000-9.png"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// sentence checks that a text is one short sentence with the given parts, and not
// the inside of a program.
func sentence(t *testing.T, what, text string, parts ...string) {
	t.Helper()
	text = strings.TrimSpace(text)
	if text == "" || len(text) > 500 || strings.Contains(text, "\n") {
		t.Errorf("%s: no sentence: %q", what, text)
	}
	for _, inside := range []string{"goroutine", "runtime error", "json:", "rpc error", "/server/", "/agent/", "%!"} {
		if strings.Contains(text, inside) {
			t.Errorf("%s: %q tells of the inside: %s", what, inside, text)
		}
	}
	for _, part := range parts {
		if !strings.Contains(text, part) {
			t.Errorf("%s: %q is missing in: %s", what, part, text)
		}
	}
}

// reason takes the sentence out of a gateway's answer.
func reason(t *testing.T, answer string) string {
	t.Helper()
	var e struct{ Error string }
	if err := json.Unmarshal([]byte(answer), &e); err != nil {
		t.Errorf("%v in %.300s", err, answer)
	}
	return e.Error
}

func badJobs(t *testing.T, p *platform) {
	task := func(name, driver, config, resources string) string {
		return fmt.Sprintf("    task %q {\n      driver = %q\n      config {\n        %s\n      }\n      resources {\n        %s\n      }\n    }\n", name, driver, config, resources)
	}
	job := func(tasks ...string) string {
		return "job \"faults\" {\n  group \"web\" {\n" + strings.Join(tasks, "") + "  }\n}\n"
	}
	driver := task("x", "dockr", `image = "nginx"`, "cpu = 50")
	device := task("y", "raw_exec", `command = "/bin/true"`, `device "nvidia/gpuu" {}`)
	model := task("z", "onnx", `model = "nosuch"`, "cpu = 50")
	version := task("z", "onnx", `model = "fashion:99"`, "cpu = 50")
	for _, c := range []struct {
		name, source string
		faults       []string
	}{
		{"three faults", job(driver, device, model), []string{
			`group.web.task.x.driver (line 4): unknown driver "dockr"; known: onnx, raw_exec, exec`,
			`group.web.task.y.resources.device.nvidia/gpuu (line 18): unknown device "nvidia/gpuu"; did you mean "nvidia/gpu"?`,
			"group.web.task.z.config.model (line 24): unknown model \"nosuch\": push it first with `rxvision model push nosuch FILE.onnx`",
		}},
		{"driver", job(driver), []string{`group.web.task.x.driver (line 4): unknown driver "dockr"`}},
		{"device", job(device), []string{`group.web.task.y.resources.device.nvidia/gpuu (line 9): unknown device "nvidia/gpuu"`}},
		{"model", job(model), []string{`group.web.task.z.config.model (line 6): unknown model "nosuch"`}},
		{"version", job(version), []string{`group.web.task.z.config.model (line 6): `, "99"}},
		{"no HCL", "job \"x\" {\n  group {\n", []string{"closing brace"}},
		{"no job", "hello\n", []string{":1,"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			file := write(t, "faults.nomad.hcl", c.source)
			r := p.command(binary, "job", "run", file)
			if r.code != 1 || len(c.faults) == 3 && strings.Count(r.text, "* ") != 3 {
				t.Errorf("exit code %d:\n%s", r.code, r.text)
			}
			r.has(t, c.faults...)
			if n := p.command(nomadBinary(t), "job", "run", file); n.code != 1 {
				t.Errorf("nomad: exit code %d:\n%s", n.code, n.text)
			} else if strings.Contains(c.source, "web") { // else the CLI has its own words
				n.has(t, c.faults...)
			}
		})
	}
	r := p.command(binary, "job", "run", filepath.Join(t.TempDir(), "nosuch.hcl"))
	if r.code != 1 {
		t.Errorf("exit code %d", r.code)
	}
	sentence(t, "no file", r.text, "nosuch.hcl: no such file")
	for name, want := range map[string]string{
		"a b": "no space", "a\nb": "control character", "a\x00b": "control character", "a\x1b[31mb": "control character",
		strings.Repeat("a", 5000): "at most 512",
	} {
		body, err := json.Marshal(map[string]any{"Job": rawJob(name)})
		if err != nil {
			t.Fatal(err)
		}
		code, text, err := send("PUT", p.http()+"/v1/jobs", nil, bytes.NewReader(body))
		if err != nil || code != 500 || !strings.Contains(text, want) || strings.Contains(text, name) && strings.ContainsAny(name, "\n\x00\x1b") {
			t.Errorf("job %.20q: %d %q %v", name, code, text, err)
		}
	}
}

// rawJob is a job that places nothing.
func rawJob(id string) map[string]any {
	return map[string]any{
		"ID": id, "Name": id, "Type": "service", "Datacenters": []string{"*"},
		"TaskGroups": []any{map[string]any{"Name": "g", "Count": 0, "Tasks": []any{
			map[string]any{"Name": "t", "Driver": "raw_exec", "Config": map[string]any{"command": "/bin/true"}},
		}}},
	}
}

func badModels(t *testing.T, p *platform) {
	good, err := os.ReadFile(filepath.Join(root, "models/fashion/fashion.onnx"))
	if err != nil {
		t.Fatal(err)
	}
	unknown := onnxtest.Identity(onnxtest.Float, []int64{1, 3})
	unknown.Nodes[0].Op = "FlyToTheMoon"
	newer := onnxtest.Identity(onnxtest.Float, []int64{1, 3})
	newer.Opset = 9999
	labels := onnxtest.Identity(onnxtest.Float, []int64{1}, [2]string{"rxvision.labels", `[""]`})
	for _, c := range []struct {
		name  string
		bytes []byte
		want  string
	}{
		{"text", []byte("hello, this is no model\n"), "not an ONNX model: byte 2 does not begin a field of one"},
		{"picture", sampleImage(t), "not an ONNX model"},
		{"zeros", make([]byte, 1<<20), "not an ONNX model"},
		{"truncated", good[:len(good)/2], "truncated ONNX model"},
		{"one byte less", good[:len(good)-1], "truncated ONNX model"},
		{"empty", nil, "the model file is empty"},
		{"unknown operator", unknown.Bytes(), "operator FlyToTheMoon: ONNX Runtime has no such operator"},
		{"newer", newer.Bytes(), "newer than ONNX Runtime"},
		{"metadata", labels.Bytes(), "label 0 is empty"},
	} {
		file := filepath.Join(t.TempDir(), "bad.onnx")
		if err := os.WriteFile(file, c.bytes, 0o600); err != nil {
			t.Fatal(err)
		}
		r := p.command(binary, "model", "push", "bad", file)
		if r.code != 1 {
			t.Errorf("%s: exit code %d", c.name, r.code)
		}
		sentence(t, c.name, r.text, "bad.onnx: ", c.want)
		if rest, ok := strings.CutPrefix(strings.TrimSpace(r.text), "rxvision: "+file+": "); !ok || len(c.bytes) > 0 && strings.Contains(rest, "bad.onnx") {
			t.Errorf("%s: %s", c.name, r.text)
		}
	}
	for _, name := range []string{"", ".", "..", "a b", "a/b", "../../etc", "a\nb", strings.Repeat("a", 200)} {
		r := p.command(binary, "model", "push", name, "models/fashion/fashion.onnx")
		if r.code != 1 {
			t.Errorf("name %q: exit code %d", name, r.code)
		}
		sentence(t, "name "+name, r.text, "invalid model name", "letters, digits")
	}
	for _, file := range []string{t.TempDir(), "/dev/zero", filepath.Join(t.TempDir(), "nosuch.onnx")} {
		r := p.command(binary, "model", "push", "bad", file)
		if r.code != 1 {
			t.Errorf("%s: exit code %d", file, r.code)
		}
		sentence(t, file, r.text, file)
	}
	sentence(t, "show", p.rxvision(1, "model", "show", "bad").text, `model "bad" is not registered`)
}

// badTensors asks the gateway with wrong tensors and wrong JSON.
func badTensors(t *testing.T, p *platform) {
	const zeros = 784
	input := func(name, shape, datatype string, elements int) string {
		data := strings.TrimSuffix(strings.Repeat("0,", elements), ",")
		return fmt.Sprintf(`{"inputs":[{"name":%q,"shape":%s,"datatype":%q,"data":[%s]}]}`, name, shape, datatype, data)
	}
	shape := "[1,1,28,28]"
	good := input("images", shape, "FP32", zeros)
	head := `{"inputs":[{"name":"images","shape":[1,1,28,28],"datatype":"FP32","data":`
	ask := func(name, path string, header map[string]string, body string, status int, parts ...string) {
		t.Helper()
		code, text, err := send("POST", p.gateway()+path, header, strings.NewReader(body))
		if err != nil || code != status {
			t.Errorf("%s: %d %.300s %v; want %d", name, code, text, err, status)
			return
		}
		sentence(t, name, reason(t, text), parts...)
	}
	const infer = "/v2/models/fashion/infer"
	for _, c := range []struct {
		name, body string
		status     int
		want       string
	}{
		{"name", input("pictures", shape, "FP32", zeros), 400, `unknown input "pictures", the model has "images"`},
		{"shape", input("images", "[1,3,28,28]", "FP32", 3*zeros), 400, `expected shape [-1,1,28,28], got [1,3,28,28]`},
		{"rank", input("images", "[784]", "FP32", zeros), 400, `expected shape [-1,1,28,28], got [784]`},
		{"negative", input("images", "[-1,1,28,28]", "FP32", zeros), 400, `expected a dimension of 0 or more`},
		{"huge shape", input("images", "[1099511627776,1099511627776,28,28]", "FP32", zeros), 400, `overflows`},
		{"type", input("images", shape, "INT64", zeros), 400, `expected datatype FP32, got INT64`},
		{"no type", input("images", shape, "FP99", zeros), 400, `unknown datatype "FP99"`},
		{"size", input("images", shape, "FP32", zeros-1), 400, `expected 784 elements, got`},
		{"larger", input("images", shape, "FP32", zeros+1), 400, `expected 784 elements, got more`},
		{"twice", `{"inputs":[` + strings.Repeat(strings.TrimSuffix(strings.TrimPrefix(good, `{"inputs":[`), "]}")+",", 1) + strings.TrimPrefix(good, `{"inputs":[`), 400, `input "images" is given twice`},
		{"output", strings.TrimSuffix(good, "}") + `,"outputs":[{"name":"nosuch"}]}`, 400, `unknown output "nosuch", the model has "logits"`},
		{"no inputs", `{"inputs":[]}`, 400, `input "images" is missing`},
		{"no object", `[]`, 400, "a JSON object"},
		{"empty", ``, 400, "a JSON object"},
		{"no JSON", `hello`, 400, "a JSON object"},
		{"cut", good[:200], 400, "images"},
		{"NaN", strings.Replace(good, "[0,", "[NaN,", 1), 400, "expected a number"},
		{"text", strings.Replace(good, "[0,", `["a",`, 1), 400, "expected a number"},
		{"null character", "{\x00", 400, "at byte 1"},
		{"nested", `{"inputs":` + strings.Repeat("[", 1_000_000), 400, "a JSON object"},
		{"nested data", head + strings.Repeat("[", 1_000_000), 400, "expected a number"},
		{"huge array", head + "[" + strings.Repeat("0,", 10_000_000) + "0]}]}", 400, "expected 784 elements, got more"},
		{"many inputs", `{"inputs":[` + strings.Repeat(good[11:len(good)-2]+",", 300) + "{}]}", 400, ""},
		{"many parameters", `{"parameters":{` + strings.Repeat(`"a":1,`, 1_000_000) + `"a":1},"inputs":[]}`, 400, "parameter"},
		{"long id", `{"id":"` + strings.Repeat("a", 10_000_000) + `","inputs":[]}`, 400, ""},
	} {
		ask(c.name, infer, nil, c.body, c.status, c.want)
	}
	binaryAsk := func(name string, size int64, data int, headerLength string, want string) {
		t.Helper()
		h := fmt.Sprintf(`{"inputs":[{"name":"images","shape":[1,1,28,28],"datatype":"FP32","parameters":{"binary_data_size":%d}}]}`, size)
		if headerLength == "" {
			headerLength = strconv.Itoa(len(h))
		}
		ask("binary "+name, infer, map[string]string{"Inference-Header-Content-Length": headerLength}, h+strings.Repeat("\x00", data), 400, want)
	}
	binaryAsk("short", 3136, 3135, "", "binary_data_size is 3136, but 3135 bytes of the body are left")
	binaryAsk("long", 3136, 3137, "", "the body has 1 bytes more")
	binaryAsk("size", 3132, 3132, "", "expected 784 elements of 4 bytes, got 3132 bytes")
	binaryAsk("negative", -1, 3136, "", "expected a number of bytes, got -1")
	binaryAsk("huge", 1<<62, 3136, "", "binary_data_size is 4611686018427387904")
	binaryAsk("header", 3136, 3136, "10", "at byte 10")
	binaryAsk("long header", 3136, 3136, "1000000", "Inference-Header-Content-Length is 1000000, but the body has")
	binaryAsk("no number", 3136, 3136, "ten", `expected a number of bytes, got "ten"`)

	ask("over the limit", infer, nil, strings.Repeat(" ", 64<<20+1), 413, "larger than this gateway's limit of 67108864 bytes")
	ask("compressed", infer, map[string]string{"Content-Encoding": "gzip"}, good, 415, "Content-Encoding")
	ask("no model", "/v2/models/nosuch/infer", nil, good, 404, `unknown model "nosuch"`)
	ask("no version", "/v2/models/fashion/versions/99/infer", nil, good, 404, `model "fashion" has no version "99"`)
	ask("no alias", "/v2/models/fashion/versions/prod/infer", nil, good, 404, `no version or alias "prod"`)
	ask("no call", "/v2/models/fashion/guess", nil, good, 404, "no call POST /v2/models/fashion/guess here")
	ask("long name", "/v2/models/"+strings.Repeat("a", 20_000)+"/infer", nil, good, 404, "unknown model")
	ask("path", "/v2/models/..%2f..%2fetc%2fpasswd/infer", nil, good, 404, "unknown model")
	code, text, err := send("GET", p.gateway()+infer, nil, nil)
	if err != nil || code != 405 || !strings.Contains(text, "expected method POST, got GET") {
		t.Errorf("GET infer: %d %s %v", code, text, err)
	}
	for _, base := range []string{p.gateway(), p.http()} {
		code, _, err = send("GET", base+"/v1/jobs", map[string]string{"X-Bomb": strings.Repeat("a", 1<<20)}, nil)
		if err == nil && code != 431 || err != nil && !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("a header of 1 MiB: %d %v", code, err)
		}
	}
	// A chunked body has no length to refuse it by.
	code, text, err = send("POST", p.gateway()+infer, nil, io.LimitReader(blanks{}, 64<<20+1))
	if err == nil && (code != 413 || !strings.Contains(text, "limit of 67108864 bytes")) {
		t.Errorf("chunked over the limit: %d %s", code, text)
	}
	// Names that nobody registered must not become labels, whatever is wrong with the rest.
	_, text, err = send("GET", p.gateway()+"/metrics", nil, nil)
	if err != nil || strings.Contains(text, `model="nosuch"`) || strings.Contains(text, "etc/passwd") {
		t.Errorf("unknown models are in the metrics, or: %v", err)
	}
	p.rxvision(1, "infer", "fashion", "--tensors", write(t, "r.json", `{"inputs":[`)).has(t, "r.json", "at byte")
}

type blanks struct{}

func (blanks) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = ' '
	}
	return len(b), nil
}

func badImages(t *testing.T, p *platform) {
	good := sampleImage(t)
	flipped := slices.Clone(good)
	flipped[len(flipped)/2] ^= 0x20
	for _, c := range []struct {
		name   string
		body   []byte
		query  string
		status int
		want   string
	}{
		{"100 megapixels", png(10_000, 10_000, 10_000), "", 413, "the image has 10000×10000 pixels, 100.0 million, at most 25.0 million are accepted"},
		{"100 megapixels claimed", png(10_000, 10_000, 0), "", 413, "100.0 million"},
		{"largest", png(1<<31-1, 1<<31-1, 0), "", 400, "PNG image is broken"},
		{"no pixels", png(0, 0, 0), "", 400, "PNG image is broken"},
		{"no data", png(28, 28, 0), "", 400, "PNG image is"},
		{"cut", good[:len(good)/2], "", 400, "PNG image is truncated"},
		{"one byte changed", flipped, "", 400, "PNG image is broken"},
		{"text", []byte("hello"), "", 415, `expected a PNG, JPEG or WebP file, got something that begins with "hello"`},
		{"empty", nil, "", 400, "the body is empty"},
		{"no classes", good, "?top_k=0", 400, `top_k is "0"; want a whole number from 1`},
		{"classes", good, "?top_k=-3", 400, "top_k"},
		{"no number", good, "?top_k=many", 400, "top_k"},
		{"huge number", good, "?top_k=99999999999999999999", 400, "top_k"},
	} {
		code, text, err := send("POST", p.gateway()+"/v1/models/fashion/classify"+c.query, nil, bytes.NewReader(c.body))
		if err != nil || code != c.status {
			t.Errorf("%s: %d %s %v; want %d", c.name, code, text, err, c.status)
		}
		sentence(t, c.name, reason(t, text), c.want)
	}
	r := p.command(binary, "infer", "fashion", "go.mod")
	if r.code != 1 {
		t.Errorf("exit code %d", r.code)
	}
	sentence(t, "no image", r.text, "go.mod: expected a PNG, JPEG or WebP file")
}

// png is an image of the size that its header claims, with rows of black pixels.
func png(width, height uint32, rows int) []byte {
	b := []byte("\x89PNG\r\n\x1a\n")
	chunk := func(kind string, data []byte) {
		b = appendUint32(b, uint32(len(data)))
		at := len(b)
		b = append(append(b, kind...), data...)
		b = appendUint32(b, crc32.ChecksumIEEE(b[at:]))
	}
	head := append(appendUint32(appendUint32(nil, width), height), 8, 0, 0, 0, 0)
	chunk("IHDR", head)
	var packed bytes.Buffer
	z := zlib.NewWriter(&packed)
	row := make([]byte, int(width%(1<<20))+1)
	for range rows {
		_, _ = z.Write(row) // into memory
	}
	_ = z.Close()
	chunk("IDAT", packed.Bytes())
	chunk("IEND", nil)
	return b
}

func appendUint32(b []byte, v uint32) []byte { return bits.BigEndian.AppendUint32(b, v) }

// badCalls asks the API for what it has not and with what it cannot take.
func badCalls(t *testing.T, p *platform) {
	for _, c := range []struct {
		method, path, body string
		status             int
		want               string
	}{
		{"GET", "/v1/nosuch", "", 404, "no such call: GET /v1/nosuch"},
		{"GET", "/v1/nosuch" + strings.Repeat("a", 20_000), "", 404, "no such call"},
		{"PATCH", "/v1/jobs", "", 405, "Invalid method"},
		{"GET", "/v1/job/nosuch", "", 404, "job not found"},
		{"GET", "/v1/allocation/xx", "", 500, "UUID must be 36 characters"},
		{"GET", "/v1/jobs?index=x", "", 400, "Invalid index"},
		{"GET", "/v1/jobs?index=-1", "", 400, "Invalid index"},
		{"GET", "/v1/jobs?index=1&wait=soon", "", 400, "Invalid wait time"},
		{"GET", "/v1/jobs?per_page=-1", "", 400, "Expect a number"},
		{"GET", "/v1/jobs?stale=maybe", "", 400, "Expect `true` or `false`"},
		{"GET", "/v1/jobs?filter=" + url.QueryEscape(strings.Repeat("(", 1000)), "", 400, "filter"},
		{"GET", "/v1/jobs?region=mars", "", 500, "No path to region"},
		{"PUT", "/v1/jobs", "", 400, "body is empty"},
		{"PUT", "/v1/jobs", "hello", 400, "the request body is not the JSON that this call takes"},
		{"PUT", "/v1/jobs", "null", 400, "Job must be specified"},
		{"PUT", "/v1/jobs", `{"Job":{"ID":5}}`, 400, "Job.ID is a JSON number; expected a string"},
		{"PUT", "/v1/jobs", `{"Job":{"ID":"x"}} more`, 400, "after top-level value"},
		{"PUT", "/v1/jobs", strings.Repeat("[", 2_000_000), 400, "nested more than 128 deep"},
		{"PUT", "/v1/jobs", `{"Job":{"TaskGroups":[` + strings.Repeat("{},", 1_000_000) + "{}]}}", 400, "more than 20000 objects"},
		{"PUT", "/v1/jobs", strings.Repeat(" ", 4<<20+1), 413, "over the limit of 4194304 bytes"},
		{"PUT", "/v1/jobs/parse", `{"JobHCL":"x = ` + strings.Repeat("(", 200_000) + `"}`, 400, "nested more than"},
		{"PUT", "/v1/models/a%2fb", "x", 404, "no such call: PUT /v1/models/a/b"},
		{"PUT", "/v1/models/a%20b", "x", 400, "invalid model name"},
		{"PUT", "/v1/models/fashion/alias/p", `{"Version":99}`, 404, `model "fashion" has no version 99`},
		{"PUT", "/v1/models/fashion/alias/p", `{"Version":-1}`, 400, "expected a whole number"},
		{"GET", "/v1/models/fashion/versions/x", "", 400, "whole number"},
		{"GET", "/v1/artifacts/sha256:" + strings.Repeat("1", 64), "", 404, "no artifact"},
		{"GET", "/v1/artifacts/..", "", 400, "digest"},
		{"GET", "/v1/artifacts/sha256:..%2f..%2f..%2fraft%2flog.db", "", 404, "no such call"},
		{"GET", "/v1/artifacts/..%2f..%2fserver-id", "", 404, "no such call"},
	} {
		name := fmt.Sprintf("%s %.60s %.30s", c.method, c.path, c.body)
		req, err := http.NewRequest(c.method, p.http()+c.path, strings.NewReader(c.body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultTransport.RoundTrip(req) // no redirects
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		text, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != c.status {
			t.Errorf("%s: %s %.300s %v; want %d", name, resp.Status, text, err, c.status)
		}
		sentence(t, name, string(bytes.ReplaceAll(text, []byte("\n"), []byte(" "))), c.want)
	}
}

// badFiles tries to leave an allocation's folder by its name.
func badFiles(t *testing.T, p *platform) {
	var allocs []struct{ ID string }
	p.get("/v1/job/fashion/allocations", &allocs)
	secret := filepath.Join(p.data, "outside")
	if err := os.WriteFile(secret, []byte("secret outside"), 0o644); err != nil {
		t.Fatal(err)
	}
	var fromRoot []string
	for up := range 12 {
		fromRoot = append(fromRoot, strings.Repeat("../", up)+"outside", strings.Repeat("../", up)+strings.TrimPrefix(secret, "/"))
	}
	for _, path := range append(fromRoot, secret, "alloc/../../../outside", "serve/../../../../../outside", "\x00", "alloc/logs/\x00", strings.Repeat("a/", 3000), "/proc/self/environ") {
		for _, op := range []string{"cat", "ls", "stat", "readat", "stream"} {
			target := fmt.Sprintf("%s/v1/client/fs/%s/%s?offset=0&limit=100&path=%s", p.http(), op, allocs[0].ID, url.QueryEscape(path))
			code, text, err := send("GET", target, nil, nil)
			if err != nil || code != 404 && code != 400 && code != 403 || strings.Contains(text, "secret") {
				t.Errorf("%s %.60q: %d %.200s %v", op, path, code, text, err)
			}
			sentence(t, op, strings.ReplaceAll(text, path, "PATH"))
		}
	}
	for query, want := range map[string]string{
		"task=nosuch&type=stdout": `task "nosuch" is not part of the allocation`, "task=../../x&type=stdout": "is not part of the allocation",
		"task=serve&type=stdin": "stdout/stderr", "task=serve&type=stdout&offset=x": "Expect a number", "task=serve&type=stdout&origin=middle": "origin",
	} {
		code, text, err := send("GET", p.http()+"/v1/client/fs/logs/"+allocs[0].ID+"?"+query, nil, nil)
		if err != nil || code != 400 && code != 404 {
			t.Errorf("logs %s: %d %s %v", query, code, text, err)
		}
		sentence(t, query, text, want)
	}
	p.nomad(1, "alloc", "fs", allocs[0].ID, "../../../../../../etc/passwd").has(t, "404")
}

// badSnapshots restores archives with a byte changed and archives cut short.
func badSnapshots(t *testing.T, p *platform) {
	dir := t.TempDir()
	file := filepath.Join(dir, "good.snap")
	p.nomad(0, "operator", "snapshot", "save", file)
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	restore := func(name string, b []byte) {
		t.Helper()
		code, text, err := send("PUT", p.http()+"/v1/operator/snapshot", nil, bytes.NewReader(b))
		if err != nil || code != 400 {
			t.Errorf("%s: %d %s %v", name, code, text, err)
		}
		sentence(t, name, text, "snapshot archive ")
	}
	for at := 0; at < len(good); at += 1 + len(good)/150 {
		bad := slices.Clone(good)
		bad[at] ^= 1 << (at % 8)
		restore(fmt.Sprintf("byte %d of %d changed", at, len(good)), bad)
	}
	for at := 0; at < len(good); at += 1 + len(good)/30 {
		restore(fmt.Sprintf("cut at %d of %d", at, len(good)), good[:at])
	}
	restore("one byte less", good[:len(good)-1])
	restore("more after it", append(slices.Clone(good), "more"...))
	restore("a bomb", bomb(t))

	changed := slices.Clone(good)
	changed[len(changed)/2] ^= 1
	bad := write(t, "bad.snap", string(changed))
	p.nomad(1, "operator", "snapshot", "restore", bad).has(t, "400", "snapshot archive is damaged")
	p.nomad(1, "operator", "snapshot", "restore", write(t, "cut.snap", string(good[:len(good)/2]))).has(t, "400", "snapshot archive is cut short")
	p.nomad(1, "operator", "snapshot", "inspect", bad)
}

// bomb is 1 GiB of zeros, packed.
func bomb(t *testing.T) []byte {
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	zeros := make([]byte, 1<<20)
	for range 1 << 10 {
		if _, err := z.Write(zeros); err != nil {
			t.Fatal(err)
		}
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return packed.Bytes()
}

// slowClients opens many connections that begin a request and never end it: who
// asks properly is answered all the while.
func slowClients(t *testing.T, p *platform) {
	const clients = 600 // more than requests may be in flight
	for _, addr := range []string{p.addrs["gateway-addr"], p.addrs["http-addr"]} {
		for _, start := range []string{
			"POST /v2/models/fashion/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 60000000\r\n\r\n{",
			"POST /v1/models/fashion/classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel",
			"GET /v1/jobs HTTP/1.1\r\nHost: x\r\nX-",
		} {
			var conns []net.Conn
			for range clients {
				c, err := net.Dial("tcp", addr)
				if err != nil {
					t.Fatal(err)
				}
				conns = append(conns, c)
				if _, err := io.WriteString(c, start); err != nil {
					t.Fatal(err)
				}
			}
			defer func() {
				for _, c := range conns {
					c.Close()
				}
			}()
		}
		classify(t, p)
		var jobs []any
		p.get("/v1/jobs", &jobs)
	}
}

// sameRegistration registers one job many times at once, with a check index of 0
// that only one may find true.
func sameRegistration(t *testing.T, p *platform) {
	body, err := json.Marshal(map[string]any{"Job": rawJob("same"), "EnforceIndex": true, "JobModifyIndex": 0})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	done := map[int]int{}
	for range 20 {
		wg.Go(func() {
			code, text, err := send("PUT", p.http()+"/v1/jobs", nil, bytes.NewReader(body))
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			done[code]++
			mu.Unlock()
			if code != 200 {
				sentence(t, "registered before", text, "job already exists")
			}
		})
	}
	wg.Wait()
	if done[200] != 1 || done[500] != 19 {
		t.Errorf("statuses of 20 registrations: %v", done)
	}
	var versions struct{ Versions []any }
	p.get("/v1/job/same/versions", &versions)
	if len(versions.Versions) != 1 {
		t.Errorf("%d versions", len(versions.Versions))
	}
}

// badCommands types what nobody should.
func badCommands(t *testing.T, p *platform) {
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"bogus"}, `unknown command "bogus"`},
		{[]string{"job", "run", "--bogus", "x"}, "unknown flag: --bogus"},
		{[]string{"job", "run"}, "arg"},
		{[]string{"job", "status", "nosuch"}, `job "nosuch"`},
		{[]string{"job", "stop", "nosuch"}, `job "nosuch"`},
		{[]string{"job", "status", "../../etc/passwd"}, "not found"},
		{[]string{"model", "alias", "fashion", "prod", "many"}, `version "many"`},
		{[]string{"model", "alias", "fashion", "prod", "99"}, "has no version 99"},
		{[]string{"infer", "fashion"}, "give image files"},
		{[]string{"infer", "nosuch", "testdata/fashion/0000-9.png"}, `unknown model "nosuch"`},
		{[]string{"infer", "--gateway", "127.0.0.1:1", "fashion", "testdata/fashion/0000-9.png"}, "cannot be reached"},
		{[]string{"job", "status", "--address", "http://127.0.0.1:1"}, "cannot be reached"},
		{[]string{"job", "status", "--address", "nowhere"}, "use the form http://HOST:PORT"},
	} {
		r := p.command(binary, c.args...)
		if r.code != 1 && r.code != 2 {
			t.Errorf("%v: exit code %d", c.args, r.code)
		}
		sentence(t, strings.Join(c.args, " "), r.text, c.want)
	}
}

// TestFullDisk fills the disk of all data: what is asked then is refused in one
// sentence, nothing that was acknowledged is lost, and it works again once there
// is room, also after kill -9 in between.
func TestFullDisk(t *testing.T) {
	disk := t.TempDir()
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=48m"); err != nil {
		t.Skipf("a small file system is needed to fill a disk; mounting one takes root: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(disk, 0); err != nil {
			t.Error(err)
		}
	})
	p := newPlatform(t)
	p.data = filepath.Join(disk, "data")
	p.start()
	p.rxvision(0, "model", "push", "fashion", "models/fashion/fashion.onnx")
	p.rxvision(0, "job", "run", write(t, "small.nomad.hcl", `
job "fashion" {
  group "serve" {
    ephemeral_disk {
      size = 10
    }
    network {
      port "http" {}
    }
    task "serve" {
      driver = "onnx"
      config {
        model = "fashion"
      }
      logs {
        max_files     = 1
        max_file_size = 1
      }
    }
    update {
      min_healthy_time = "100ms"
    }
  }
}`))

	ballast, err := os.Create(filepath.Join(disk, "ballast"))
	if err != nil {
		t.Fatal(err)
	}
	defer ballast.Close()
	for size := 1 << 20; size > 0; {
		if _, err := ballast.Write(make([]byte, size)); errors.Is(err, syscall.ENOSPC) {
			size /= 2
		} else if err != nil {
			t.Fatal(err)
		}
	}
	filled, err := ballast.Seek(0, io.SeekCurrent)
	if err == nil {
		err = ballast.Truncate(filled - 1<<20) // room for some
	}
	if err != nil {
		t.Fatal(err)
	}
	register := func(id string) (int, string) {
		t.Helper()
		job := rawJob(id)
		job["Meta"] = map[string]string{"ballast": strings.Repeat("x", 60_000)}
		body, err := json.Marshal(map[string]any{"Job": job})
		if err != nil {
			t.Fatal(err)
		}
		code, text, err := send("PUT", p.http()+"/v1/jobs", nil, bytes.NewReader(body))
		if err != nil {
			return 0, err.Error()
		}
		return code, text
	}
	acknowledged, refused := map[string]bool{}, 0
	for i := 0; refused < 2; i++ {
		id := fmt.Sprintf("job-%d", i)
		switch code, text := register(id); code {
		case 200:
			acknowledged[id], refused = true, 0
		case 503:
			refused++
			sentence(t, "register", strings.ReplaceAll(text, p.data+"/server", "DATA"), "is full", "nothing was stored", "free some space")
		default:
			t.Fatalf("register: %d %s", code, text)
		}
		if i > 2000 {
			t.Fatal("the disk does not fill")
		}
	}
	model := onnxtest.Identity(onnxtest.Float, []int64{1, 3})
	model.Initializers = []onnxtest.Tensor{{Name: "w", Elem: onnxtest.Float, Dims: []int64{1 << 18}, Raw: make([]byte, 1<<20)}}
	file := write(t, "more.onnx", string(model.Bytes()))
	push := p.command(binary, "model", "push", "more", file)
	if push.code != 1 {
		t.Errorf("push on a full disk: exit code %d", push.code)
	}
	sentence(t, "push", strings.ReplaceAll(push.text, p.data+"/server", "DATA"), "the disk of the server's ", "is full", "nothing was stored", "free some space")
	classify(t, p) // serving needs no disk

	there := func() {
		t.Helper()
		var jobs []struct{ ID string }
		p.get("/v1/jobs?stale", &jobs) // there may be no leader without a disk
		have := map[string]bool{}
		for _, j := range jobs {
			have[j.ID] = true
		}
		for id := range acknowledged {
			if !have[id] {
				t.Errorf("%s was acknowledged and is gone", id)
			}
		}
		for id := range have {
			if id != "fashion" && !acknowledged[id] {
				t.Errorf("%s was refused and is there", id)
			}
		}
	}
	there()
	if len(acknowledged) == 0 {
		t.Error("nothing was acknowledged: the test proves nothing")
	}

	// All ends on the full disk, the hard way and the soft way.
	for _, pid := range p.find("server", "--data-dir") {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	p.kill()
	p.rxvision(0, append([]string{"dev", "--stop", "--data-dir", p.data}, p.flags()...)...)
	if left := p.processes(); len(left) != 0 {
		t.Fatalf("left behind on the full disk: %v", left)
	}
	if err := ballast.Truncate(0); err != nil {
		t.Fatal(err)
	}
	p.start()
	p.await("writes are taken again", func() bool {
		code, _ := register("after")
		return code == 200
	})
	acknowledged["after"] = true
	p.rxvision(0, "model", "push", "more", file)
	there()
	p.await("the model answers after the restart", func() bool {
		return p.command(binary, "infer", "fashion", "testdata/fashion/0000-9.png").code == 0
	})
}
