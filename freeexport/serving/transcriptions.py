"""OpenAI's /v1/audio/transcriptions and /v1/audio/translations.

A request is a form with a WAV file. A response is JSON, text or subtitles.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import threading
from dataclasses import dataclass
from email.message import Message
from typing import Any, Literal

import msgspec

from freeexport.serving.errors import ApiError, draining, invalid, unsupported
from freeexport.serving.events import EventStream
from freeexport.serving.service import RequestLog
from runtime import GenerationResult, Segment, SegmentStream, SpeechOptions
from runtime.errors import cut, shown
from runtime.options.generation_options import Mode

FORMATS = ("json", "text", "srt", "verbose_json", "vtt")
LARGEST_AUDIO = 64 << 20  # bytes of a form: 35 minutes of 16-bit mono at 16 kHz
MOST_PARTS = 32  # in a form
LARGEST_HEAD = 4 << 10  # bytes of the headers of a part
END = b"data: [DONE]\n\n"
LARGEST_TEXT = 64 << 10  # bytes of all fields together, except the file


@dataclass(frozen=True)
class Transcription:
    """Validated request.

    Attributes:
        file: Content of the WAV file.
        model: Model name. Default: the only model.
        format: Format of the response.
        stream: Answer with events.
        segments: The response has segments, if its format does.
        options: Options of the session.
    """

    file: bytes
    model: str | None
    format: Literal["json", "text", "srt", "verbose_json", "vtt"]
    stream: bool
    segments: bool
    options: SpeechOptions

    @classmethod
    def of(
        cls,
        fields: dict[str, bytes],
        task: Literal["transcribe", "translate"],
        mode: Mode | None,
        limit: float | None,
    ) -> Transcription:
        """Validate the fields of a form. Removes `file` from `fields`.

        Args:
            fields: Fields of the form.
            task: Transcribe, or translate to English.
            mode: The server's mode.
            limit: The server's time limit in seconds.

        Raises:
            ApiError: If a field is missing, unknown or invalid.
            OptionError: If an option is invalid.
        """
        file = fields.pop("file", None)
        if not file:
            raise invalid(
                "file", "file is missing or empty; send a WAV file as the field `file` of a form"
            )
        text = {name: value.decode("utf-8", "replace").strip() for name, value in fields.items()}
        granularities = [
            value
            for name in ("timestamp_granularities[]", "timestamp_granularities")
            for value in text.pop(name, "").split("\n")
            if value
        ]
        format = text.pop("response_format", "json")
        if format not in FORMATS:
            raise invalid(
                "response_format",
                f"response_format is {shown(format)}; choose {', '.join(FORMATS)}",
            )
        for wrong in sorted({*granularities} - {"segment", "word"})[:1]:
            raise invalid(
                "timestamp_granularities",
                f"timestamp_granularities has {shown(wrong)}; choose segment, word or both",
            )
        if granularities and format != "verbose_json":
            raise invalid(
                "timestamp_granularities",
                f"timestamp_granularities is given with response_format {format!r}; use "
                "verbose_json",
            )
        stream = text.pop("stream", "false").lower() not in ("false", "0")
        if stream and format != "json":
            raise invalid("stream", f"stream is given with response_format {format!r}; use json")
        model = text.pop("model", None)
        prompt = text.pop("prompt", None)
        language = text.pop("language", None)
        temperature = text.pop("temperature", "0")
        for name in text:
            raise unsupported(cut(name), "remove it")
        try:
            degree = float(temperature)
        except ValueError:
            raise invalid(
                "temperature", f"temperature is {shown(temperature)}; give a number from 0 to 1"
            ) from None
        return cls(
            file,
            model or None,
            format,  # type: ignore[arg-type]
            stream=stream,
            segments=not granularities or "segment" in granularities,
            options=SpeechOptions(
                task=task,
                language=language or None,
                initial_prompt=prompt or None,
                temperature=degree or None,
                timestamps=format in ("srt", "verbose_json", "vtt"),
                word_timestamps="word" in granularities,
                mode=mode,
                deadline=limit,
            ),
        )

    def answer(self, result: GenerationResult, seconds: float) -> dict[str, Any] | str:
        """Return the body of the response. A string is sent as plain text.

        Args:
            result: Result of the session.
            seconds: Duration of the audio.
        """
        segments = result.segments or ()
        if self.format == "text":
            return result.text + "\n"
        if self.format == "srt":
            return "".join(
                f"{number}\n{_times(each, ',')}{_line(each)}"
                for number, each in enumerate(segments, 1)
            )
        if self.format == "vtt":
            return "WEBVTT\n\n" + "".join(f"{_times(each, '.')}{_line(each)}" for each in segments)
        if self.format == "json":
            return {"text": result.text}
        answer: dict[str, Any] = {
            "task": self.options.task,
            "language": result.language,
            "duration": round(seconds, 3),
            "text": result.text,
        }
        if self.segments:
            answer["segments"] = [_fields(number, each) for number, each in enumerate(segments)]
        if self.options.word_timestamps:
            answer["words"] = [
                {"word": word.text.strip(), "start": word.start, "end": word.end}
                for segment in segments
                for word in segment.words or ()
            ]
        return answer


class TranscriptStream(EventStream):
    """Streams the text of a transcript, segment by segment.

    Args:
        segments: The segments.
        cancel: Event that ends the transcription.
        deadline: The server's time limit in seconds.
        record: Log line of the request.
    """

    def __init__(
        self,
        segments: SegmentStream,
        cancel: threading.Event,
        deadline: float | None,
        record: RequestLog,
    ) -> None:
        super().__init__(f"transcript-{secrets.token_hex(12)}", record)
        self._segments = segments
        self._cancel = cancel
        self._deadline = deadline

    async def _events(self) -> None:
        begun = False
        while (segment := await asyncio.to_thread(next, self._segments, None)) is not None:
            delta = segment.text if begun else segment.text.lstrip()
            if delta:
                begun = True
                await self._write(_event("delta", delta=delta))
        result = checked(self._segments.result, self._deadline)
        await self._write(_event("done", text=result.text) + END)

    def _failed(self, error: ApiError) -> bytes:
        return b"data: " + msgspec.json.encode(error.body) + b"\n\n" + END

    async def _end(self) -> list[GenerationResult]:
        self._cancel.set()
        return [] if self._segments.result is None else [self._segments.result]


def _event(kind: str, **fields: str) -> bytes:
    data = {"type": f"transcript.text.{kind}", **fields}
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def checked(result: GenerationResult | None, deadline: float | None) -> GenerationResult:
    """Return a result if it is complete.

    Raises:
        ApiError: If the server's deadline passed, or the session was closed.
    """
    if result is None or result.finish_reason == "deadline":
        raise late(deadline)
    if result.interrupted:
        raise draining()
    return result


def late(deadline: float | None) -> ApiError:
    """Return the error of a transcription that is incomplete at the server's deadline."""
    limit = f"the server's limit of {deadline or 0:g} s expired before the transcription"
    return ApiError(
        504, f"{limit} was complete; send shorter audio", "deadline_exceeded", again=False
    )


def _fields(number: int, segment: Segment) -> dict[str, Any]:
    return {
        "id": number,
        "seek": int(segment.start * 100),
        "start": segment.start,
        "end": segment.end,
        "text": segment.text,
        "tokens": list(segment.token_ids),
        "temperature": segment.temperature,
        "avg_logprob": segment.avg_logprob or 0.0,
        "compression_ratio": segment.compression_ratio,
        "no_speech_prob": segment.no_speech_prob or 0.0,
    }


def _times(segment: Segment, point: str) -> str:
    def clock(seconds: float) -> str:
        whole = round(seconds * 1000)
        return (
            f"{whole // 3_600_000:02}:{whole // 60_000 % 60:02}:"
            f"{whole // 1000 % 60:02}{point}{whole % 1000:03}"
        )

    return f"{clock(segment.start)} --> {clock(segment.end)}\n"


def _line(segment: Segment) -> str:
    return f"{segment.text.strip().replace('-->', '->')}\n\n"


def form_fields(content_type: str, body: bytes) -> dict[str, bytes]:
    """Return the fields of a multipart/form-data body. Lists, as `name[]`, have a line per value.

    Raises:
        ApiError: If the body is not such a form, is too large, or repeats a field.
    """
    header = Message()
    header["Content-Type"] = content_type[:LARGEST_HEAD]
    boundary = header.get_param("boundary")
    if (
        header.get_content_type() != "multipart/form-data"
        or not isinstance(boundary, str)
        or not boundary
    ):
        raise _invalid("the body is not a form; send multipart/form-data with a field `file`")
    fields: dict[str, bytes] = {}
    line = b"--" + boundary.encode("ascii", "replace")
    parts = 0
    texts = 0
    end = body.find(line)
    while end >= 0 and not body.startswith(b"--", end + len(line)):
        begin = end + len(line)
        end = body.find(b"\r\n" + line, begin)
        if end < 0:
            break
        split = body.find(b"\r\n\r\n", begin, min(end, begin + LARGEST_HEAD))
        name = re.search(
            rb'(?:^|;)\s*name="([^"]*)"', body[begin : max(begin, split)].replace(b"\r\n", b";")
        )
        if name is None:
            raise _invalid("a form part has no name; send fields as multipart/form-data")
        key = name[1].decode("utf-8", "replace")
        listed = key.endswith("[]")
        if key in fields and not listed:
            raise _invalid(f"the form field {shown(key)} is repeated; send it once")
        value = body[split + 4 : end]
        fields[key] = fields[key] + b"\n" + value if key in fields else value
        parts += 1
        texts += 0 if key == "file" else len(value)
        if parts > MOST_PARTS or texts > LARGEST_TEXT:
            raise _invalid(
                f"the form has more than {MOST_PARTS} fields "
                f"or {LARGEST_TEXT} bytes beside the file"
            )
        end += 2
    return fields


def _invalid(message: str) -> ApiError:
    return ApiError(400, message, "invalid_form")
